"""What was seen of the traffic, in bounded space: the last windows, and groups of older ones.

Mixed traffic comes back: a plan that fits windows of an hour ago fits the next one like them. So
older windows are not dropped: the two most alike are merged, with their weights, whenever there are
more than fit (Ward's criterion). Beside the windows are kept the means that could predict the next
one, and scores of how well each would have done so far, by which `forecast` weighs them.

Layers are independent, and everything that is compared is an integer or computed in a fixed order:
the history of a layer is the same, bit for bit, in every batch and sharding.

References:
    J. H. Ward, "Hierarchical grouping to optimize an objective function", Journal of the American
    Statistical Association 58, 1963. R. DerSimonian and N. Laird, "Meta-analysis in clinical
    trials", Controlled Clinical Trials 7, 1986: the spread between windows, beyond sampling noise.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Num

from eplb_jax.arrays import along, first_equal, fixed_point, ordered_sum, unfused
from eplb_jax.checks import as_count
from eplb_jax.sharding import by_layers

RECENT = 8
"""Windows that are kept as they are."""

REMEMBERED = 8
"""Groups of older windows."""

TOTAL = 1 << 23
"""The load of a layer and window, in the integer units used here; exact in float32."""

GAINS = (64, 45, 32, 19, 10)
"""Gains of the exponentially weighted means, in 64ths."""

_KEPT = 1 - 1 / 64
"""What is left of a weight or score after one more window."""

_LOW = 9
"""Bits dropped from shares before differences are squared, so that sums fit in an int32."""

_PARTS = 1 << 7
"""Resolution of the weights by which two groups are merged."""

_MOST_TOKENS = 1e30
"""Larger totals are cut to this, so that no product overflows."""


class Scores(NamedTuple):
    """How well each part of a history would have foretold the windows that came after it.

    Errors are sums of absolute differences of shares, weighted by evidence; older ones decay.

    Attributes:
        seen: Weight of the windows so far.
        error: Error of the mean of the recent windows.
        lead: By how much the error of each exponentially weighted mean was less.
        lead_squared: Sum of the squares of that.
        tried: Weight of the windows that there were remembered ones for.
        nearest: Distance to the nearest recent window.
        gain: By how much the nearest remembered one was nearer.
    """

    seen: Float[Array, " L"]
    error: Float[Array, " L"]
    lead: Float[Array, "gains L"]
    lead_squared: Float[Array, "gains L"]
    tried: Float[Array, " L"]
    nearest: Float[Array, " L"]
    gain: Float[Array, " L"]


class History(NamedTuple):
    """What was seen of the traffic: a pytree of fixed size, a part of the state of a service.

    Attributes:
        recent: Tokens of the last H windows with load of every layer, oldest first; zeros where
            there are none yet.
        remembered: Mean shares of K groups of older windows, in units of `TOTAL`.
        tokens: Tokens of every group.
        windows: Number of windows of every group, older ones counting less; 0: no group.
        means: Exponentially weighted means of all windows, in units of `TOTAL`, one for each gain.
        scores: How well each of these would have foretold the windows after it.
        current: The sum over the current window.
        rest: The rounding error of current.
        steps: Number of steps in the current window.
    """

    recent: Float[Array, "H L E"]
    remembered: Int32[Array, "K L E"]
    tokens: Float[Array, "K L"]
    windows: Float[Array, "K L"]
    means: Int32[Array, "gains L E"]
    scores: Scores
    current: Float[Array, "L E"]
    rest: Float[Array, "L E"]
    steps: Int32[Array, ""]


def init_history(
    num_layers: int, num_experts: int, *, recent: int = RECENT, remembered: int = REMEMBERED
) -> History:
    """A history of nothing.

    Args:
        num_layers: L.
        num_experts: E.
        recent: H, windows that are kept as they are.
        remembered: K, groups of older windows; 0 forgets them.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is less than 1, or `remembered` less than 0.

    Example:
        >>> init_history(58, 256).recent.shape
        (8, 58, 256)
    """
    recent, remembered = as_count("recent", recent), as_count("remembered", remembered, least=0)
    shape = as_count("num_layers", num_layers, least=0), as_count("num_experts", num_experts)
    return empty_history(recent, remembered, *shape)


def empty_history(recent: int, remembered: int, num_layers: int, num_experts: int) -> History:
    """`init_history` of checked numbers."""
    shape, gains = (num_layers, num_experts), len(GAINS)

    def zeros(*count: int) -> Float[Array, "..."]:
        return jnp.zeros((*count, num_layers), jnp.float32)

    # Distinct arrays, so that a caller can donate all of them.
    return History(
        jnp.zeros((recent, *shape), jnp.float32),
        jnp.zeros((remembered, *shape), jnp.int32),
        zeros(remembered),
        zeros(remembered),
        jnp.zeros((gains, *shape), jnp.int32),
        Scores(zeros(), zeros(), zeros(gains), zeros(gains), zeros(), zeros(), zeros()),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((), jnp.int32),
    )


def update_history(history: History, load: Num[Array, "L E"], steps_per_window: int = 1) -> History:
    """The history after one more step; pure, and meant for `jax.jit`, also inside a model.

    Sums over the steps of a window neither overflow nor stop growing: they are float32 with the
    rounding error kept beside them, correct to 2^-24 for any number of steps. A layer without load
    in a window keeps its history. O(K^2 E) a layer when a window is complete.

    Args:
        history: What was seen so far.
        load: Tokens of every expert in this step, float32 or int32. NaN and negative loads count
            as zero, infinite ones as the largest float32.
        steps_per_window: Number of steps of a window.

    Raises:
        ValueError: The load has another shape, or steps_per_window is less than 1.

    Example:
        >>> history = init_history(1, 3, recent=2)
        >>> for step in range(4):
        ...     history = update_history(history, jnp.array([[step, 1, 0]]), steps_per_window=2)
        >>> history.recent.tolist()
        [[[1.0, 2.0, 0.0]], [[5.0, 2.0, 0.0]]]
    """
    steps_per_window = as_count("steps_per_window", steps_per_window)
    load = jnp.asarray(load)
    if load.shape != history.current.shape:
        raise ValueError(f"load has the shape {load.shape}, the history's {history.current.shape}")
    return _update(history, load, steps_per_window=steps_per_window)


@by_layers
@partial(jax.jit, static_argnames="steps_per_window")
def _update(past: History, load: Num[Array, "L E"], *, steps_per_window: int) -> History:
    addend = finite(load.astype(jnp.float32)) + past.rest
    total = past.current + addend
    # Knuth's two-sum: the rounding error of `total`.
    gained = total - past.current
    rest = (past.current - (total - gained)) + (addend - gained)
    if steps_per_window == 1:
        zero = jnp.zeros_like(total)
        return add_window(past, total)._replace(current=zero, rest=zero)
    steps = past.steps + 1

    def complete(past: History) -> History:
        zero = jnp.zeros_like(total)
        return add_window(past, total)._replace(current=zero, rest=zero, steps=steps * 0)

    def go_on(past: History) -> History:
        return past._replace(current=total, rest=rest, steps=steps)

    return lax.cond(steps >= steps_per_window, complete, go_on, past)


def finite(load: Float[Array, "..."]) -> Float[Array, "..."]:
    """Loads with a defined meaning: NaN and negative ones are zero, infinite ones the largest."""
    return jnp.nan_to_num(jnp.maximum(load, 0), posinf=float(np.finfo(np.float32).max))


class Windows(NamedTuple):
    """Windows as shares of their load, and what each of them says.

    Attributes:
        share: In units of `TOTAL`.
        tokens: Their load; zero for empty ones.
        spread: The variance of shares between them, beyond sampling noise.
        evidence: The weight of each, from 0 to 1: see `evidence_of`.
    """

    share: Int32[Array, "T L E"]
    tokens: Float[Array, "T L"]
    spread: Float[Array, " L"]
    evidence: Float[Array, "T L"]


def windows_of(load: Float[Array, "T L E"], *, by_size: bool = False) -> Windows:
    """Shares and evidence of windows; `by_size`: as if all of their spread were sampling noise."""
    largest = jnp.max(load, axis=2, keepdims=True)
    units = fixed_point(load / jnp.where(largest > 0, largest, 1), load.shape[2], 30)
    total = jnp.sum(units, axis=2, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    share = (units.astype(jnp.float32) / jnp.where(total > 0, total, 1) * TOTAL).astype(jnp.int32)
    one = fixed_point(jnp.ones((), jnp.float32), load.shape[2], 30).astype(jnp.float32)
    tokens = jnp.minimum(largest * (total / one), _MOST_TOKENS)[..., 0]
    spread = jnp.zeros_like(tokens[0]) if by_size else _spread(share, tokens)
    return Windows(share, tokens, spread, evidence_of(tokens, spread, jnp.max(tokens, axis=0)))


def evidence_of(
    tokens: Float[Array, "T L"], spread: Float[Array, " L"], largest: Float[Array, " L"]
) -> Float[Array, "T L"]:
    """What a window of so many tokens says, relative to the largest: 1 / (spread + 1 / tokens).

    Shares counted from n tokens vary by 1 / n around those of the traffic, which vary by `spread`
    from window to window.
    """
    noise = 1 / jnp.maximum(largest, 1 / _MOST_TOKENS)
    return unfused(tokens * (spread + noise)) / (unfused(tokens * spread) + 1)


def _spread(share: Int32[Array, "T L E"], tokens: Float[Array, "T L"]) -> Float[Array, " L"]:
    total = ordered_sum(tokens, 0)
    part = tokens / jnp.where(total > 0, total, 1)
    found = unfused(part * _squares(share - weighted_mean(share, part)[None]))
    # Of T windows around their common mean, sampling noise leaves (T - 1) / n in the mean.
    noise = (ordered_sum((tokens > 0).astype(jnp.float32), 0) - 1) / jnp.where(total > 0, total, 1)
    rest = 1 - ordered_sum(unfused(part * part), 0)
    apart = jnp.maximum(ordered_sum(found, 0) - noise, 0)
    return jnp.where(rest > 1e-6, apart / jnp.where(rest > 1e-6, rest, 1), 0)


def weighted_mean(share: Int32[Array, "T L E"], weight: Float[Array, "T L"]) -> Int32[Array, "L E"]:
    """The mean of windows; zero where all weights are."""
    total = ordered_sum(weight, 0)
    weight = weight / jnp.where(total > 0, total, 1)
    return ordered_sum(unfused(share.astype(jnp.float32) * weight[..., None]), 0).astype(jnp.int32)


def _squares(apart: Int32[Array, "... E"]) -> Float[Array, "..."]:
    """The sum of squared differences of shares."""
    apart = apart >> _LOW
    squares = jnp.sum(apart * apart, axis=-1, dtype=jnp.int32)
    return squares.astype(jnp.float32) / (TOTAL >> _LOW) ** 2


def _distance(x: Int32[Array, "... E"], y: Int32[Array, "... E"]) -> Float[Array, "..."]:
    """The sum of absolute differences of shares."""
    return jnp.sum(jnp.abs(x - y), axis=-1, dtype=jnp.int32).astype(jnp.float32) / TOTAL


def add_window(past: History, load: Float[Array, "L E"], *, by_size: bool = False) -> History:
    """The history after one more window of `finite` loads; a layer without load keeps its own."""
    windows = windows_of(jnp.concatenate([past.recent, load[None]]), by_size=by_size)
    new, present = windows.share[-1], windows.tokens[-1] > 0
    first = past.scores.seen == 0
    # A window that says little hardly changes the means.
    gain = jnp.asarray(GAINS, jnp.float32)[:, None] * windows.evidence[-1]
    change = ((new[None] - past.means) >> 6) * (gain + 0.5).astype(jnp.int32)[..., None]
    means = jnp.where(first[:, None], new[None], past.means + change)
    groups = _remember(past, windows)
    recent = jnp.concatenate([past.recent[1:], load[None]])
    after = past._replace(
        recent=jnp.where(present[:, None], recent, past.recent),
        remembered=jnp.where(present[:, None], groups[0], past.remembered),
        tokens=jnp.where(present, groups[1], past.tokens),
        windows=jnp.where(present, groups[2], past.windows),
        means=jnp.where(present[:, None], means, past.means),
    )
    scores = jax.tree.map(
        lambda new, old: jnp.where(present, new, old), _score(past, windows), past.scores
    )
    return after._replace(scores=scores)


def _score(past: History, windows: Windows) -> Scores:
    """The scores after one more window, by what was known before it."""
    new, weight = windows.share[-1], windows.evidence[-1]
    scores, share = past.scores, windows.share[:-1]
    known = windows.evidence[:-1]

    def add(score: Float[Array, "*g L"], term: Float[Array, "*g L"]) -> Float[Array, "*g L"]:
        return unfused(score * _KEPT) + unfused(term)

    # Before the second window the means are all the same.
    compared = jnp.where(jnp.sum((known > 0).astype(jnp.int32), axis=0) > 1, weight, 0)
    error = _distance(new, weighted_mean(share, known))
    lead = error - _distance(new[None], past.means)
    far = 2.0  # no two windows are further apart
    nearest = jnp.min(jnp.where(known > 0, _distance(new[None], share), far), axis=0)
    tried, gain = jnp.zeros_like(weight), jnp.zeros_like(weight)
    if len(past.remembered):
        known = past.windows > 0
        tried = jnp.where(jnp.any(known, axis=0), weight, 0)
        nearer = jnp.min(jnp.where(known, _distance(new[None], past.remembered), far), axis=0)
        gain = jnp.maximum(nearest - nearer, 0)
    return Scores(
        seen=add(scores.seen, weight),
        error=add(scores.error, compared * error),
        lead=add(scores.lead, compared * lead),
        lead_squared=add(scores.lead_squared, compared * unfused(lead * lead)),
        tried=add(scores.tried, tried),
        nearest=add(scores.nearest, tried * nearest),
        gain=add(scores.gain, tried * gain),
    )


def _remember(
    past: History, windows: Windows
) -> tuple[Int32[Array, "K L E"], Float[Array, "K L"], Float[Array, "K L"]]:
    """The groups with the oldest recent window among them, the two most alike merged."""
    count = len(past.remembered)
    if count == 0:
        return past.remembered, past.tokens, past.windows
    oldest = windows.tokens[:1]
    share = jnp.concatenate([past.remembered, windows.share[:1]])
    tokens = jnp.concatenate([past.tokens * _KEPT, oldest])
    number = jnp.concatenate([past.windows * _KEPT, (oldest > 0).astype(jnp.float32)])
    mean_size = tokens / jnp.where(number > 0, number, 1)
    weight = number * evidence_of(mean_size, windows.spread, jnp.max(windows.tokens, axis=0))

    pairs = np.array(list(itertools.combinations(range(count + 1), 2)), np.int32)
    one, other = pairs.T
    both = weight[one] + weight[other]
    harmonic = weight[one] * weight[other] / jnp.where(both > 0, both, 1)
    cost = _squares(share[one] - share[other]) * harmonic
    # Free places are used first.
    cost = jnp.where((number[one] > 0) & (number[other] > 0), cost, -1)
    chosen = first_equal(cost, jnp.min(cost, axis=0))
    i, j = jnp.asarray(one)[chosen], jnp.asarray(other)[chosen]

    def at(x: Array, index: Int32[Array, " L"]) -> Array:
        return along(x, index[None, :, None] if x.ndim == 3 else index[None], 0)[0]

    part = at(weight, j) / jnp.where(at(both, chosen) > 0, at(both, chosen), 1)
    part = (part * _PARTS + 0.5).astype(jnp.int32)[:, None]
    first, second = at(share, i), at(share, j)
    merged = jnp.where(part == _PARTS, second, first + ((second - first) >> 7) * part)
    place = jnp.arange(count, dtype=jnp.int32)[:, None]

    def replace(x: Array, merged: Array) -> Array:
        here, gone = ((place == k[None]) for k in (i, j))
        if x.ndim == 3:
            here, gone = here[..., None], gone[..., None]
        return jnp.where(here, merged[None], jnp.where(gone, x[-1:], x[:-1]))

    return (
        replace(share, merged),
        replace(tokens, at(tokens, i) + at(tokens, j)),
        replace(number, at(number, i) + at(number, j)),
    )
