"""What to plan for, given past windows: the windows themselves, and a prediction of the next.

A plan for the last window fits only that window. Loads of one traffic move together as topics come
and go, and a plan that is balanced in every past window stays balanced in what mixes them. Where
loads drift independently, only a prediction is worth fitting. So plans are made for the windows and
a prediction, which is weighted by how well it has predicted the past ones.

Computed in integers, in units of a layer's total load, so that the same windows give the same plan
in every batch, sharding and backend.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import along, fixed_point, ordered_sum, relative, sanitise

MOST_WINDOWS = 16
"""Longer histories are merged into this many windows."""

_TOTAL = 1 << 23
"""The load of a layer and window, in the integer units used here; exact in float32."""

_GAINS = (0, 64, 45, 32, 19, 10)
"""Gains of the exponentially weighted means, in 64ths; 0 stands for the plain mean."""

_TRUST = 4
"""Weight of a prediction, in windows per window, that errs 1 / sqrt(2) of what the mean does."""

_MOST_TRUST = 8
"""Maximum weight of a prediction, in windows per window."""

_PARTS = 16
"""Resolution of prediction weights: they are integers, in 16ths."""


class Forecast(NamedTuple):
    """What to plan for. With several windows, each sums to 1, or to 0 if it is empty.

    Attributes:
        load: The expected load: the weighted mean of windows and prediction, or the one window.
        above: The peak of every expert over that, scaled down as the prediction gains weight.
        windows: The T windows and the prediction, each times the square root of its weight.
    """

    load: Float[Array, "L E"]
    above: Float[Array, "L E"] | None = None
    windows: Float[Array, "L T+1 E"] | None = None

    def map(self, change: Callable[[Array], Array]) -> "Forecast":
        """The same function of all fields."""
        return jax.tree.map(change, self)


def forecast_of(weight: Float[Array, "*T L E"], *, summed: bool) -> Forecast:
    """The forecast from one load or from windows; `summed`: their plain sum, as DeepSeek plans."""
    windows = weight if weight.ndim == 3 else weight[None]
    if summed:
        return Forecast(sanitise(ordered_sum(windows, 0)))
    if windows.shape[0] == 1:
        return Forecast(relative(sanitise(windows[0])))
    with jax.named_scope("forecast"):
        return forecast(sanitise(jnp.moveaxis(windows, 0, 1)))


def forecast(windows: Float[Array, "L T E"]) -> Forecast:
    """The forecast from windows, oldest first.

    The prediction is an exponentially weighted mean whose gain, for each layer, would have
    predicted the past windows with the least sum of absolute errors. With r the ratio of the plain
    mean's error to that, its weight is min(_TRUST (r^2 - 1), _MOST_TRUST) windows per window.
    """
    share, nonzero = _shares(windows)
    count = jnp.sum(nonzero, axis=1, dtype=jnp.int32)
    predicted, trust = _predict(share, nonzero)
    mean = jnp.sum(share, axis=1, dtype=jnp.int32) // jnp.maximum(count, 1)
    load = (_PARTS * mean + trust * predicted) // (_PARTS + trust)
    above = jnp.maximum(jnp.max(share, axis=1) - load, 0).astype(jnp.float32)
    above = above * _PARTS / (_PARTS + trust).astype(jnp.float32)
    weight = jnp.sqrt((trust * count).astype(jnp.float32) / _PARTS)
    fitted = jnp.concatenate(
        [share.astype(jnp.float32), (predicted.astype(jnp.float32) * weight)[:, None]], axis=1
    )
    return Forecast(load.astype(jnp.float32) / _TOTAL, above / _TOTAL, fitted / _TOTAL)


def _shares(windows: Float[Array, "L T E"]) -> tuple[Int32[Array, "L T E"], Bool[Array, "L T 1"]]:
    """Every window in units of 1 / `_TOTAL` of its load, and whether it has any load."""
    num_experts = windows.shape[2]
    largest = jnp.max(windows, axis=2, keepdims=True)
    nonzero = largest > 0
    units = fixed_point(windows / jnp.where(nonzero, largest, 1), num_experts, 30)
    total = jnp.sum(units, axis=2, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    share = units.astype(jnp.float32) / jnp.where(nonzero, total, 1) * _TOTAL
    return share.astype(jnp.int32), nonzero


class _Means(NamedTuple):
    """Carry of `_predict`: the means of the windows so far, and their errors as predictions."""

    plain: Int32[Array, "L E"]
    weighted: Int32[Array, "gains L E"]
    windows: Int32[Array, "L 1"]
    error: Int32[Array, "gains+1 L"]


def _predict(
    share: Int32[Array, "L T E"], nonzero: Bool[Array, "L T 1"]
) -> tuple[Int32[Array, "L E"], Int32[Array, "L 1"]]:
    """The prediction of each layer, and its weight in 1 / `_PARTS` of that of the windows."""
    gains = jnp.asarray(_GAINS[1:], jnp.int32)[:, None, None]

    def step(means: _Means, window: tuple[Array, Array]) -> tuple[_Means, None]:
        new, present = window
        state = jnp.concatenate([means.plain[None], means.weighted])
        missed = jnp.sum(jnp.abs(new[None] - state), axis=-1, dtype=jnp.int32) // MOST_WINDOWS
        # Before the second window all gains err alike.
        error = means.error + jnp.where((present & (means.windows > 1))[None, :, 0], missed, 0)
        count = means.windows + present.astype(jnp.int32)
        plain = jnp.where(present, (new - means.plain) // jnp.maximum(count, 1), 0)
        apart = new[None] - means.weighted
        change = jnp.where((count > 1)[None], (apart >> 6) * gains, apart)
        weighted = means.weighted + jnp.where(present[None], change, 0)
        return _Means(means.plain + plain, weighted, count, error), None

    first = share[:, 0]
    start = _Means(
        first,
        jnp.broadcast_to(first, (len(gains), *first.shape)),
        nonzero[:, 0].astype(jnp.int32),
        jnp.zeros((len(_GAINS), share.shape[0]), jnp.int32),
    )
    rest = jnp.moveaxis(share[:, 1:], 1, 0), jnp.moveaxis(nonzero[:, 1:], 1, 0)
    (mean, means, _, error), _ = lax.scan(step, start, rest)
    state = jnp.concatenate([mean[None], means])
    best = jnp.argmin(error, axis=0).astype(jnp.int32)
    predicted = along(state, best[None, :, None], 0)[0]
    least = jnp.min(error, axis=0).astype(jnp.float32)
    ratio = jnp.where(least > 0, error[0].astype(jnp.float32) / jnp.where(least > 0, least, 1), 1)
    trust = (ratio - 1) * (ratio + 1) * (_TRUST * _PARTS)
    trust = jnp.minimum(trust, _MOST_TRUST * _PARTS).astype(jnp.int32)
    return predicted, trust[:, None]


def merge_windows(windows: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """At most `MOST_WINDOWS` windows [T, L, E]: of more, consecutive ones are summed."""
    count = len(windows)
    if windows.ndim == 2 or count <= MOST_WINDOWS:
        return windows
    starts = np.arange(MOST_WINDOWS) * count // MOST_WINDOWS
    into = np.searchsorted(starts, np.arange(count), "right") - 1
    if isinstance(windows, jax.Array):
        return _merge(windows, jnp.asarray(into))
    merged = np.zeros((MOST_WINDOWS, *windows.shape[1:]), windows.dtype)
    with np.errstate(over="ignore"):
        for window, number in zip(windows, into, strict=True):
            merged[number] += window
    return merged


@jax.jit
def _merge(windows: Float[Array, "T L E"], into: Int32[Array, " T"]) -> Float[Array, "w L E"]:
    """Sums of windows in their order, each into the one of its number."""

    def add(sums: Array, window: tuple[Array, Array]) -> tuple[Array, None]:
        load, number = window
        return sums.at[number].add(load), None

    empty = jnp.zeros((MOST_WINDOWS, *windows.shape[1:]), windows.dtype)
    return lax.scan(add, empty, (windows, into))[0]
