"""What past windows say of the next: the loads to plan for, and how far they may be off.

A plan for the last window fits that window alone. Loads of one traffic move together, as topics
come and go, and packs that are even in every past window stay even in what mixes them. So plans
are made for the windows themselves, and for a prediction that weighs the more, the better it has
foretold them: loads that drift on their own leave no window but the last worth fitting.

All in whole numbers, parts of a layer's total, so that the same windows give the same plan
whatever the batch, the sharding and the backend.
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
"""More are added up to so many stretches."""

_TOTAL = 1 << 23
"""What a window of a layer adds up to; float32 holds it exactly."""

_GAINS = (0, 64, 45, 32, 19, 10)
"""Of exponentially weighted means, in 64ths; 0 stands for the plain mean."""

_TRUST = 4
"""How many times the windows a prediction weighs that errs 1 / sqrt 2 of what the mean does."""

_MOST_TRUST = 8
_PARTS = 16
"""Of which weights of the prediction are whole numbers."""


class Forecast(NamedTuple):
    """What to plan for. Of several windows each adds up to 1, but one of zeros to 0.

    Attributes:
        load: The middle of what may come; of a single window, that window.
        above: How far above it an expert was at most; less, the more the prediction weighs.
        windows: The T windows and the prediction, each times the root of its weight.
    """

    load: Float[Array, "L E"]
    above: Float[Array, "L E"] | None = None
    windows: Float[Array, "L T+1 E"] | None = None

    def map(self, change: Callable[[Array], Array]) -> "Forecast":
        """The same change to all."""
        return jax.tree.map(change, self)


def forecast_of(weight: Float[Array, "*T L E"], *, summed: bool) -> Forecast:
    """From one load, or from windows; `summed`: for the sum of them as it is, as DeepSeek plans."""
    windows = weight if weight.ndim == 3 else weight[None]
    if summed:
        return Forecast(sanitise(ordered_sum(windows, 0)))
    if windows.shape[0] == 1:
        return Forecast(relative(sanitise(windows[0])))
    with jax.named_scope("forecast"):
        return forecast(sanitise(jnp.moveaxis(windows, 0, 1)))


def forecast(windows: Float[Array, "L T E"]) -> Forecast:
    """Of windows that are `sanitise`, oldest first.

    The prediction is an exponentially weighted mean whose gain, for each layer, would have
    foretold the past windows best, absolute errors added up.
    """
    share, seen = _shares(windows)
    count = jnp.sum(seen, axis=1, dtype=jnp.int32)
    predicted, trust = _predicted(share, seen)
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
    """Every window in parts of `_TOTAL`, and whether it holds anything."""
    num_experts = windows.shape[2]
    largest = jnp.max(windows, axis=2, keepdims=True)
    seen = largest > 0
    units = fixed_point(windows / jnp.where(seen, largest, 1), num_experts, 30)
    total = jnp.sum(units, axis=2, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    share = units.astype(jnp.float32) / jnp.where(seen, total, 1) * _TOTAL
    return share.astype(jnp.int32), seen


def _predicted(
    share: Int32[Array, "L T E"], seen: Bool[Array, "L T 1"]
) -> tuple[Int32[Array, "L E"], Int32[Array, "L 1"]]:
    """The prediction of each layer, and its weight in `_PARTS` of that of the windows."""
    gains = jnp.asarray(_GAINS[1:], jnp.int32)[:, None, None]

    def step(carry: tuple[Array, ...], window: tuple[Array, Array]) -> tuple[tuple, None]:
        mean, means, count, error = carry
        new, there = window
        missed = [jnp.sum(jnp.abs(new - x), axis=-1, dtype=jnp.int32) for x in (mean, means)]
        missed = jnp.concatenate([missed[0][None], missed[1]]) // MOST_WINDOWS
        # The first error is that of the first window, whatever the gain.
        error += jnp.where((there & (count > 1))[:, 0], missed, 0)
        count += there.astype(jnp.int32)
        mean += jnp.where(there, (new - mean) // jnp.maximum(count, 1), 0)
        change = jnp.where(count > 1, ((new - means) >> 6) * gains, new - means)
        means += jnp.where(there, change, 0)
        return (mean, means, count, error), None

    first = share[:, 0]
    start = (
        first,
        jnp.broadcast_to(first, (len(gains), *first.shape)),
        seen[:, 0].astype(jnp.int32),
        jnp.zeros((len(_GAINS), share.shape[0]), jnp.int32),
    )
    rest = jnp.moveaxis(share[:, 1:], 1, 0), jnp.moveaxis(seen[:, 1:], 1, 0)
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
    """At most `MOST_WINDOWS` windows [T, L, E]: of more, consecutive ones are added up."""
    count = len(windows)
    if windows.ndim == 2 or count <= MOST_WINDOWS:
        return windows
    starts = np.arange(MOST_WINDOWS) * count // MOST_WINDOWS
    if isinstance(windows, np.ndarray):
        with np.errstate(over="ignore"):
            return np.add.reduceat(windows, starts)
    return _merge(
        windows, jnp.asarray(np.repeat(np.arange(MOST_WINDOWS), np.diff([*starts, count])))
    )


@jax.jit
def _merge(windows: Float[Array, "T L E"], into: Int32[Array, " T"]) -> Float[Array, "w L E"]:
    """Windows added up in their order, each into the one of its number."""

    def add(sums: Array, window: tuple[Array, Array]) -> tuple[Array, None]:
        load, number = window
        return sums.at[number].add(load), None

    empty = jnp.zeros((MOST_WINDOWS, *windows.shape[1:]), windows.dtype)
    return lax.scan(add, empty, (windows, into))[0]
