"""Whether to move to a new plan: the time it saves while it is in place, and the time to move."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_amount, as_load
from eplb_jax.evaluation.cost_fit import fit_windows
from eplb_jax.evaluation.metrics import gpu_loads
from eplb_jax.evaluation.step_time import CostFit, as_seconds, windows_of
from eplb_jax.planning.cost import Cost
from eplb_jax.transition.moves import moves
from eplb_jax.types import Placement, Topology

Action = Literal["apply", "keep", "undecided"]


class Decision(NamedTuple):
    """What to do, and the numbers behind it. L is 1 for the plans of one layer.

    Attributes:
        action: "apply" the new plan, "keep" the old one, or "undecided": keep the old one until
            there are more windows to judge by.
        gain: Seconds that the new plan saves in a window, mean over windows.
        error: The standard error of that mean, with that of a fitted cost; infinite for fewer than
            two windows, and where the fit has not seen what the new plan changes.
        cost: Seconds that moving takes.
        payback: Number of windows after which the saved time exceeds the cost; infinite if never.
        layer_gain: Seconds that each layer saves in a window.
        layer_bytes: Bytes that each layer moves between GPUs.
        order: The layers by descending gain per byte: the first k are the ones to move first.
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
    old: Placement | LoadLike,
    new: Placement | LoadLike,
    topology: Topology | int,
    *,
    bytes_per_expert: int,
    bandwidth: float,
    serves: float,
    seconds_per_token: float | None = None,
    measured_seconds: ArrayLike | None = None,
    cost: Cost | CostFit | None = None,
    split: Literal["flexible"] | None = None,
    margin: float = 0.5,
    confidence: float = 1.0,
) -> Decision:
    """Whether a new plan is worth moving to. Runs on the host and cannot be traced.

    A step waits for the slowest GPU of every layer. So the time of a plan in a window is that of
    these GPUs, summed over layers: their tokens times the time per token, or by a cost. Layers move
    one after another, and each takes as long as the GPU that sends or receives most. The new plan
    is applied if its gain in a window exceeds (1 + margin) * cost / serves by `confidence` standard
    errors; the old one is kept if the gain is below by as many.

    With measured times, the cost is that of `fit_cost`. The old plan is kept where time does not
    follow the load, and the new one is only applied where it does.

    The windows should not be those that the new plan was made from, which overstate the gain.

    Args:
        load: Tokens in the windows to judge by: [T, L, E], or [L, E] or [E] for one window.
        old: The plan in place, or its phy2log.
        new: The plan to come, or its phy2log.
        topology: GPUs, slots and nodes of both plans.
        bytes_per_expert: Size of the parameters of one expert of one layer.
        bandwidth: Bytes per second that a GPU sends, and receives.
        serves: Number of windows that the new plan will stay in place.
        seconds_per_token: Time of one token of one expert on a GPU. Give this, measured_seconds or
            cost.
        measured_seconds: [T], the time that every window took with the old plan in place; or of
            every GPU, as of `fit_cost`.
        cost: Of a replica, in seconds, for plans whose replicas share equally; or the result of
            `fit_cost` on other windows, with tiles, or with known steps.
        split: "flexible": replicas share tokens as by `runtime.split_load`. None: equally.
        margin: Fraction by which the gain must exceed the cost. This hysteresis stops similar plans
            from replacing each other in turn.
        confidence: Number of standard errors by which the gain must differ from the cost.

    Returns:
        What to do, with gain, cost and the layers by descending gain per byte.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Loads, plans and topology do not fit, a number is negative or not finite,
            bandwidth or serves is zero, not exactly one of seconds_per_token, measured_seconds and
            cost is given, or there are both a cost and a split.

    Example:
        >>> old, new = [[0, 1, 2, 3]], [[0, 2, 1, 3]]
        >>> load = [[[4, 4, 1, 1]], [[5, 4, 1, 1]]]
        >>> cost = dict(bytes_per_expert=10**6, bandwidth=1e9, serves=100, seconds_per_token=1e-3)
        >>> answer = decide(load, old, new, Topology(2, slots=2), **cost)
        >>> answer.action, round(answer.gain, 6), round(answer.cost, 6)
        ('apply', 0.003, 0.001)
    """
    array = as_load(load, "load")
    bandwidth, serves = _positive("bandwidth", bandwidth), _positive("serves", serves)
    margin = _positive("margin", margin, zero=True)
    confidence = _positive("confidence", confidence, zero=True)
    given = [x for x in (seconds_per_token, measured_seconds, cost) if x is not None]
    if len(given) != 1:
        got = ("neither", "one", "both", "all")[len(given)]
        raise ValueError(f"give one of cost, seconds_per_token and measured_seconds, got {got}")
    token = 1.0
    if isinstance(cost, Cost) and cost.is_proportional:
        seconds_per_token, cost = cost.per_token, None
    if seconds_per_token is not None:
        token = _positive("seconds_per_token", seconds_per_token, zero=True)
    if measured_seconds is not None:
        windows = windows_of(array, old, topology, split=split)
        seconds = as_seconds("measured_seconds", measured_seconds, windows.tokens.shape)
        cost = fit_windows(windows, seconds)
    if isinstance(cost, CostFit):
        follows = cost.follows
        saved, fit_error = cost.saving(array, old, new, topology, split=split)
    else:
        before, after = (_max_load(array, x, topology, split, cost) for x in (old, new))
        follows, saved, fit_error = True, (before - after) * token, 0.0  # [T, L]
    total = saved.sum(axis=1)
    count = len(total)
    gain = float(total.mean())
    error = float(total.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    error = float(np.hypot(error, fit_error))
    traffic = moves(old, new, topology).traffic(bytes_per_expert)
    sent, received = (np.atleast_2d(x) for x in (traffic.sent, traffic.received))
    moving = float(np.maximum(sent, received).max(axis=1).sum() / bandwidth)
    layer_bytes = received.sum(axis=1)
    layer_gain = saved.mean(axis=0)
    doubt = confidence * error if confidence else 0.0
    least = (1 + margin) * moving / serves
    action = "apply" if gain - doubt > least else "keep" if gain + doubt <= least else "undecided"
    if not follows and action != "keep":
        action = "keep" if follows is False else "undecided"
    return Decision(
        action,
        gain,
        error,
        moving,
        moving / gain if gain > 0 else (0.0 if moving == 0 else float("inf")),
        layer_gain,
        layer_bytes,
        np.argsort(-_rate(layer_gain, layer_bytes), kind="stable"),
    )


def _rate(gain: Float[np.ndarray, " L"], size: Int[np.ndarray, " L"]) -> np.ndarray:
    """Gain per byte; of the layers that move nothing, infinite with the sign of the gain."""
    free = np.where(gain == 0, 0, np.copysign(np.inf, gain))
    return np.where(size > 0, gain / np.where(size > 0, size, 1), free)


def _max_load(
    load: Float[Array, "*TL E"] | np.ndarray,
    plan: Placement | LoadLike,
    topology: Topology | int,
    split: Literal["flexible"] | None,
    cost: Cost | None,
) -> Float[np.ndarray, "T L"]:
    """Tokens of the most loaded GPU, or time of the slowest one, in float64."""
    gpu_load = np.asarray(gpu_loads(load, plan, topology, split=split, cost=cost), np.float64)
    return gpu_load.max(axis=-1).reshape(len(load) if load.ndim == 3 else 1, -1)


def _positive(name: str, value: float, *, zero: bool = False) -> float:
    number = as_amount(name, value)
    if number == 0 and not zero:
        raise ValueError(f"{name}=0 must be more than 0")
    return number
