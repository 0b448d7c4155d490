"""Whether to put a plan in place: what it gains in the time it serves, and what moving costs."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_amount, as_load
from eplb_jax.evaluation.metrics import gpu_loads
from eplb_jax.transition.moves import moves
from eplb_jax.types import Placement

Action = Literal["apply", "keep", "not enough evidence"]


class Decision(NamedTuple):
    """What to do, and the numbers behind it.

    Attributes:
        action: "apply", "keep", or "not enough evidence", until which to keep the plan in place.
        gain: Seconds that the new plan saves in a window, in the mean over windows.
        error: The standard error of that mean; infinite for fewer than two windows.
        cost: Seconds that moving takes.
        payback: After how many windows moving has paid for itself; infinite if it never does.
        layer_gain: Seconds that each layer saves in a window.
        layer_bytes: Bytes that each layer fetches from other GPUs.
        order: The layers by falling gain per byte: the first k are those to move first.
    """

    action: Action
    gain: float
    error: float
    cost: float
    payback: float
    layer_gain: Float[np.ndarray, " L"]
    layer_bytes: Int[np.ndarray, " L"]
    order: Int[np.ndarray, " L"]


def decide(
    load: LoadLike,
    old: Placement,
    new: Placement,
    num_gpus: int,
    *,
    num_nodes: int = 1,
    bytes_per_expert: int,
    bandwidth: float,
    serves: float,
    seconds_per_token: float | None = None,
    measured_seconds: ArrayLike | None = None,
    margin: float = 0.5,
    confidence: float = 1.0,
) -> Decision:
    """Whether a new plan is worth moving to.

    A step waits for the heaviest GPU of every layer, so a plan's time in a window is the tokens of
    those GPUs, added up over layers, times the time of a token. Moving takes, layer after layer,
    what the GPU that sends or receives most needs. The new plan is applied if what it saves in a
    window is more than cost / serves, by `margin` and by `confidence` standard errors; if it is
    less by so many, the old one is kept.

    The windows should be others than the new plan was made from, or the gain is flattered.

    Args:
        load: [T, L, E] tokens of the windows to judge by, or [L, E] of one.
        old: The plan in place.
        new: The plan to come.
        num_gpus: G; divides the number of slots.
        num_nodes: N; divides G.
        bytes_per_expert: Parameters of one expert of one layer.
        bandwidth: Bytes a second that a GPU sends, and receives.
        serves: Windows that the new plan will stay in place for.
        seconds_per_token: What one token of one expert takes on a GPU; or else
        measured_seconds: [T], what the experts of all layers took in every window with the old
            plan in place: the time of a token is read off that.
        margin: By how much more than its cost a move must gain: hysteresis, lest plans that are
            much alike take turns.
        confidence: How many standard errors of the gain count against either answer.

    Returns:
        What to do, with gain, cost and the layers in the order of gain per byte.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Loads and plans do not fit, a number is negative or not finite, bandwidth
            or serves is zero, or not one of seconds_per_token and measured_seconds is given.

    Example:
        >>> import eplb_jax
        >>> old = eplb_jax.rebalance_experts([[3, 1, 3, 1]], 4, 1, 1, 2)
        >>> new = eplb_jax.rebalance_experts([[9, 8, 2, 2]], 4, 1, 1, 2)
        >>> load = [[[4, 4, 1, 1]], [[5, 4, 1, 1]]]
        >>> cost = dict(bytes_per_expert=10**6, bandwidth=1e9, serves=100, seconds_per_token=1e-3)
        >>> answer = decide(load, old, new, 2, **cost)
        >>> answer.action, round(answer.gain, 6), round(answer.cost, 6)
        ('apply', 0.003, 0.001)
    """
    array = np.asarray(as_load(load, "load", windows=True))
    windows = array if array.ndim == 3 else array[None]
    bandwidth, serves = _positive("bandwidth", bandwidth), _positive("serves", serves)
    margin = _positive("margin", margin, zero=True)
    confidence = _positive("confidence", confidence, zero=True)
    before, after = (_heaviest(windows, plan, num_gpus) for plan in (old, new))
    token = _token_seconds(seconds_per_token, measured_seconds, before)

    saved = (before - after) * token  # [T, L]
    total = saved.sum(axis=1)
    count = len(total)
    gain = float(total.mean())
    error = float(total.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    traffic = moves(old, new, num_gpus, num_nodes).traffic(bytes_per_expert)
    cost = float(np.maximum(traffic.sent, traffic.received).max(axis=1).sum() / bandwidth)
    layer_bytes = traffic.received.sum(axis=1)
    layer_gain = saved.mean(axis=0)
    return Decision(
        _action(gain, confidence * error if confidence else 0.0, (1 + margin) * cost / serves),
        gain,
        error,
        cost,
        cost / gain if gain > 0 else (0.0 if cost == 0 else float("inf")),
        layer_gain,
        layer_bytes,
        np.argsort(-_rate(layer_gain, layer_bytes), kind="stable"),
    )


def _action(gain: float, doubt: float, least: float) -> Action:
    if gain - doubt > least:
        return "apply"
    if gain + doubt <= least:
        return "keep"
    return "not enough evidence"


def _rate(gain: Float[np.ndarray, " L"], size: Int[np.ndarray, " L"]) -> np.ndarray:
    """Gain per byte; what gains and moves nothing comes first, what loses that way last."""
    free = np.where(gain == 0, 0, np.copysign(np.inf, gain))
    return np.where(size > 0, gain / np.where(size > 0, size, 1), free)


def _heaviest(windows: np.ndarray, plan: Placement, num_gpus: int) -> np.ndarray:
    """Tokens of the heaviest GPU, [T, L], in float64."""
    loads = [gpu_loads(window, plan, num_gpus) for window in windows]
    return np.asarray(jax.device_get(jnp.stack(loads)), np.float64).max(axis=2)


def _token_seconds(
    given: float | None, measured: ArrayLike | None, heaviest: Float[np.ndarray, "T L"]
) -> float:
    if (given is None) == (measured is None):
        got = "neither" if given is None else "both"
        raise ValueError(f"give one of seconds_per_token and measured_seconds, got {got}")
    if given is not None:
        return _positive("seconds_per_token", given, zero=True)
    seconds = np.asarray(measured, np.float64)
    if seconds.shape != heaviest.shape[:1]:
        wanted = heaviest.shape[:1]
        raise ValueError(f"measured_seconds must have the shape {wanted}, got {seconds.shape}")
    if not np.all(np.isfinite(seconds) & (seconds >= 0)):
        raise ValueError("measured_seconds must be finite and not negative")
    tokens = heaviest.sum()
    return float(seconds.sum() / tokens) if tokens else 0.0


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    number = as_amount(name, value)
    if number == 0 and not zero:
        raise ValueError(f"{name}=0 must be more than 0")
    return number
