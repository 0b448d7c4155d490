"""What to plan for, given the past: windows, groups of older ones, and a prediction of the next.

A plan for the last window fits only that window. Loads of one traffic move together as topics come
and go, and a plan that is balanced in every past window stays balanced in what mixes them. Where
loads drift independently, only a prediction is worth fitting. What each part weighs is read off the
trace: by how much it would have foretold later windows better (`eplb_jax.planning.history`).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import along, first_equal, ordered_sum, relative, sanitise, unfused
from eplb_jax.checks import LoadLike, as_load
from eplb_jax.planning.history import RECENT, REMEMBERED, History, add_window, empty_history
from eplb_jax.planning.scores import Scores
from eplb_jax.planning.windows import TOTAL, evidence_of, finite, weighted_mean, windows_of

_TRUST = 4
"""Weight of a prediction, in windows per window, that errs 1 / sqrt(2) of what the mean does."""

_MOST_TRUST = 8
"""Maximum weight of a prediction, in windows per window."""

_STANDARD_ERRORS = 1.5
"""By so many standard errors the lead of a prediction over the mean is taken to be less."""

_PRIOR, _PRIOR_GAIN = 1.0, 0.05
"""Before there is evidence: so many windows, in which memory was so much nearer than the last."""

_NO_GAIN, _FULL_GAIN = 0.03, 0.1
"""By how much memory must be nearer to weigh anything, and as much as recent windows."""


class Forecast(NamedTuple):
    """What to plan for. With several windows, each sums to at most 1, or to 0 if it is empty.

    Attributes:
        load: The expected load: the weighted mean of windows and prediction, or the one window.
        above: The peak of every expert over that, scaled down as the prediction gains weight.
        windows: Windows, groups and the prediction, each times the square root of its weight.
    """

    load: Float[Array, "L E"]
    above: Float[Array, "L E"] | None = None
    windows: Float[Array, "L T E"] | None = None

    @property
    def fitted(self) -> Float[Array, "L T E"]:
        """The windows to balance; the one load where there are no several."""
        return self.load[:, None] if self.windows is None else self.windows

    def map(self, change: Callable[[Array], Array]) -> "Forecast":
        """The same function of all fields."""
        return jax.tree.map(change, self)


def as_load_or_history(
    value: LoadLike | History, name: str, **options: Any
) -> Array | np.ndarray | History:
    """`as_load`, which a history needs not."""
    return value if isinstance(value, History) else as_load(value, name, **options)


def layers_and_experts(load: Array | np.ndarray | History) -> tuple[int, int]:
    """Layers and experts."""
    array = load.current if isinstance(load, History) else load
    return array.shape[-2], array.shape[-1]


def tokens_of_a_window(load: Array | np.ndarray | History) -> Float[Array, ""]:
    """Tokens of a layer in a window, mean over those with any; 1 without."""
    windows = jnp.asarray(load.recent if isinstance(load, History) else load)
    total = jnp.sum(sanitise(windows), axis=-1)
    count = jnp.maximum(jnp.sum(total > 0), 1).astype(jnp.float32)
    return jnp.maximum(jnp.sum(total) / count, 1)


def as_weights(
    weights: LoadLike | Literal["equal"] | None, load: Array | np.ndarray | History
) -> Float[Array, " T"] | None:
    """The weight of every window of an array of windows; None: by evidence."""
    if weights is None:
        return None
    if isinstance(load, History):
        raise ValueError("weights must be None for a history, whose windows have their own")
    if load.ndim < 3:
        raise ValueError(f"weights are of windows [T, L, E]; load has the shape {load.shape}")
    if isinstance(weights, str):
        if weights != "equal":
            raise ValueError(f'weights={weights!r} is not known; nearest: weights="equal"')
        return jnp.ones(len(load), jnp.float32)
    array = jnp.asarray(as_load(weights, "weights", ("window",)))
    if array.shape != load.shape[:1]:
        raise ValueError(f"weights must have the shape {load.shape[:1]}, got {array.shape}")
    return array


def forecast_of(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None = None,
    *,
    summed: bool,
) -> Forecast:
    """The forecast from one load, windows or a history; `summed`: their sum, as DeepSeek plans.

    Args:
        load: What was seen.
        weights: Of the windows; None: by evidence.
        summed: Whether to add everything up.
    """
    if isinstance(load, History):
        if summed:
            return Forecast(sanitise(sum_of(load)))
        with jax.named_scope("forecast"):
            return forecast(load)
    windows = load if load.ndim == 3 else load[None]
    if summed:
        return Forecast(sanitise(ordered_sum(windows, 0)))
    if windows.shape[0] == 1:
        return Forecast(relative(sanitise(windows[0])))
    with jax.named_scope("forecast"):
        return forecast(history_of(windows, weights), by_size=weights is not None)


def history_of(
    windows: Float[Array, "T L E"], weights: Float[Array, " T"] | None = None
) -> History:
    """The history after these windows, oldest first."""
    windows = finite(windows)
    if weights is not None:
        total = ordered_sum(sanitise(windows), 2)[..., None]
        windows = sanitise(windows) / jnp.where(total > 0, total, 1) * weights[:, None, None]
    count, num_layers, num_experts = windows.shape
    kept = REMEMBERED if count > RECENT else 0
    start = empty_history(min(count, RECENT), kept, num_layers, num_experts)
    by_size = weights is not None

    def add(past: History, load: Array) -> tuple[History, None]:
        return add_window(past, load, by_size=by_size), None

    return lax.scan(add, start, windows)[0]


def sum_of(history: History) -> Float[Array, "L E"]:
    """All tokens that the history knows of."""
    share = history.remembered.astype(jnp.float32) / TOTAL
    groups = unfused(share * history.tokens[..., None])
    return ordered_sum(jnp.concatenate([groups, history.recent]), 0)


def forecast(history: History, *, by_size: bool = False) -> Forecast:
    """The forecast from a history.

    A window weighs its evidence; a group that of its windows, times the trust in memory. The
    prediction is the exponentially weighted mean that leads the mean of the recent windows most. It
    weighs _TRUST (r^2 - 1) windows per recent window, _MOST_TRUST at most, r the ratio of their
    errors, with 1.5 standard errors taken from the lead.
    """
    share, weight, says = weigh(history, by_size=by_size)
    load = weighted_mean(share, weight)
    # A peak counts as far as its window does.
    excess = jnp.maximum(share[:-1] - load[None], 0).astype(jnp.float32) * says[..., None]
    total, past = ordered_sum(weight, 0), ordered_sum(weight[:-1], 0)
    above = jnp.max(excess, axis=0) * (past / jnp.where(total > 0, total, 1))[:, None]
    # Squares of loads are added up, in units of the largest weight; what weighs nothing comes last.
    scale = jnp.sqrt(weight / jnp.maximum(jnp.max(weight, axis=0, keepdims=True), 1e-6))
    fitted = share.astype(jnp.float32) * scale[..., None]
    order = jnp.argsort((weight == 0).astype(jnp.int32), axis=0, stable=True).astype(jnp.int32)
    fitted = jnp.moveaxis(along(fitted, order[..., None], 0), 0, 1)
    return Forecast(load.astype(jnp.float32) / TOTAL, above / TOTAL, fitted / TOTAL)


def weigh(
    history: History, *, by_size: bool = False
) -> tuple[Int32[Array, "T L E"], Float[Array, "T L"], Float[Array, "T-1 L"]]:
    """Groups, recent windows and the prediction, their weights, and what a window of each says."""
    recent = windows_of(finite(history.recent), by_size=by_size)
    predicted, trust = _prediction(history)
    number, most = history.windows, jnp.max(recent.tokens, axis=0)
    size = history.tokens / jnp.where(number > 0, number, 1)
    says = evidence_of(size, recent.spread, most) * _trust_in_memory(history.scores)[None]
    ahead = trust * ordered_sum(recent.evidence, 0)
    return (
        jnp.concatenate([history.remembered, recent.share, predicted[None]]),
        jnp.concatenate([number * says, recent.evidence, ahead[None]]),
        jnp.concatenate([jnp.minimum(says, 1), recent.evidence]),
    )


def _prediction(history: History) -> tuple[Int32[Array, "L E"], Float[Array, " L"]]:
    """The prediction of each layer, and its weight in windows per recent window."""
    scores = history.scores
    sure = scores.lead - unfused(_STANDARD_ERRORS * jnp.sqrt(scores.lead_squared))
    lead = jnp.max(sure, axis=0)
    best = first_equal(sure, lead)
    left = scores.error - lead
    better = (lead > 0) & (left > 0)
    ratio = jnp.where(better, scores.error / jnp.where(better, left, 1), 1)
    trust = jnp.minimum((ratio - 1) * (ratio + 1) * _TRUST, _MOST_TRUST)
    return along(history.means, best[None, :, None], 0)[0], trust


def _trust_in_memory(scores: Scores) -> Float[Array, " L"]:
    """The weight of a remembered window beside a recent one: by how much nearer it was later."""
    nearer = scores.gain / jnp.where(scores.nearest > 0, scores.nearest, 1)
    gain = (unfused(nearer * scores.tried) + _PRIOR * _PRIOR_GAIN) / (scores.tried + _PRIOR)
    return jnp.clip((gain - _NO_GAIN) / (_FULL_GAIN - _NO_GAIN), 0, 1)
