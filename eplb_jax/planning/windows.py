"""Windows as shares of their load, what each of them says, and groups of windows alike.

Everything that is compared is an integer or computed in a fixed order, layer by layer: the results
are the same, bit for bit, in every batch and sharding.

References:
    R. DerSimonian and N. Laird, "Meta-analysis in clinical trials", Controlled Clinical Trials 7,
    1986: the spread between windows, beyond sampling noise. J. H. Ward, "Hierarchical grouping to
    optimize an objective function", Journal of the American Statistical Association 58, 1963.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import along, first_equal, fixed_point, ordered_sum, unfused

TOTAL = 1 << 23
"""The load of a layer and window, in the integer units used here; exact in float32."""

_LOW = 9
"""Bits dropped from shares before differences are squared, so that sums fit in an int32."""

_PARTS = 1 << 7
"""Resolution of the weights by which two groups are merged."""

_MOST_TOKENS = 1e30
"""Larger totals are cut to this, so that no product overflows."""


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
    says = unfused(tokens * (spread + noise)[None])
    return says / (unfused(tokens * spread[None]) + 1)


def _spread(share: Int32[Array, "T L E"], tokens: Float[Array, "T L"]) -> Float[Array, " L"]:
    total = ordered_sum(tokens, 0)
    total = jnp.where(total > 0, total, 1)
    part = tokens / total[None]
    found = unfused(part * squares(share - weighted_mean(share, part)[None]))
    # Of T windows around their common mean, sampling noise leaves (T - 1) / n in the mean.
    noise = (ordered_sum((tokens > 0).astype(jnp.float32), 0) - 1) / total
    rest = 1 - ordered_sum(unfused(part * part), 0)
    apart = jnp.maximum(ordered_sum(found, 0) - noise, 0)
    return jnp.where(rest > 1e-6, apart / jnp.where(rest > 1e-6, rest, 1), 0)


def weighted_mean(share: Int32[Array, "T L E"], weight: Float[Array, "T L"]) -> Int32[Array, "L E"]:
    """The mean of windows; zero where all weights are."""
    total = ordered_sum(weight, 0)
    weight = weight / jnp.where(total > 0, total, 1)[None]
    return ordered_sum(unfused(share.astype(jnp.float32) * weight[..., None]), 0).astype(jnp.int32)


def squares(apart: Int32[Array, "... E"]) -> Float[Array, "..."]:
    """The sum of squared differences of shares."""
    apart = apart >> _LOW
    squares = jnp.sum(apart * apart, axis=-1, dtype=jnp.int32)
    return squares.astype(jnp.float32) / (TOTAL >> _LOW) ** 2


def distance(x: Int32[Array, "... E"], y: Int32[Array, "... E"]) -> Float[Array, "..."]:
    """The sum of absolute differences of shares."""
    return jnp.sum(jnp.abs(x - y), axis=-1, dtype=jnp.int32).astype(jnp.float32) / TOTAL


class Groups(NamedTuple):
    """Fields of a `History` that describe groups; one of them without K."""

    remembered: Int32[Array, "*K L E"]
    tokens: Float[Array, "*K L"]
    windows: Float[Array, "*K L"]


def merge_two(groups: Groups, added: Groups, windows: Windows) -> Groups:
    """As many groups, with one more among them: the two with the least cost are merged.

    The cost is by how much the squared distance of windows to the mean of their group grows.
    """
    count = len(groups.remembered)
    every = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), groups, added)
    share, tokens, number = every
    mean_size = tokens / jnp.where(number > 0, number, 1)
    weight = number * evidence_of(mean_size, windows.spread, jnp.max(windows.tokens, axis=0))

    one, other = np.array(list(itertools.combinations(range(count + 1), 2)), np.int32).T
    both = weight[one] + weight[other]
    harmonic = weight[one] * weight[other] / jnp.where(both > 0, both, 1)
    cost = squares(share[one] - share[other]) * harmonic
    # Free places are used first.
    cost = jnp.where((number[one] > 0) & (number[other] > 0), cost, -1)
    chosen = first_equal(cost, jnp.min(cost, axis=0))
    i, j = jnp.asarray(one)[chosen], jnp.asarray(other)[chosen]

    def at(x: Array, index: Int32[Array, " L"]) -> Array:
        return along(x, index[None, :, None] if x.ndim == 3 else index[None], 0)[0]

    part = at(weight, j) / jnp.where(at(both, chosen) > 0, at(both, chosen), 1)
    part = (part * _PARTS + 0.5).astype(jnp.int32)[:, None]
    first, second = at(share, i), at(share, j)
    merged = Groups(
        jnp.where(part == _PARTS, second, jnp.maximum(first + ((second - first) >> 7) * part, 0)),
        at(tokens, i) + at(tokens, j),
        at(number, i) + at(number, j),
    )

    def replace(x: Array, merged: Array) -> Array:
        place = jnp.arange(count, dtype=jnp.int32)[:, None]
        here, gone = (place == k[None] for k in (i, j))
        if x.ndim == 3:
            here, gone = here[..., None], gone[..., None]
        return jnp.where(here, merged[None], jnp.where(gone, x[-1:], x[:-1]))

    return jax.tree.map(replace, every, merged)
