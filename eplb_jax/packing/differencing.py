"""Constructions that look at all items at once: good packings for exchanges to start from."""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import LOAD_BITS, falling, first_equal, fixed_point, loads_of
from eplb_jax.packing.constructions import Constructed, Construction, lane_by_lane, quantised_greedy
from eplb_jax.packing.exhaustive import MOST_WAYS, exhaustive, ways


class _Tuples(NamedTuple):
    """Carry of `differencing`: what was merged so far.

    ``sums`` are the loads of the packs of every tuple, ``tuple_of`` the tuple that every chunk
    of m items is in, and ``items`` the item of every chunk in every pack of its tuple.
    """

    sums: Int32[Array, "c m"]
    tuple_of: Int32[Array, " c"]
    items: Int32[Array, "c m"]


def differencing(
    weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
) -> Constructed:
    """Balanced largest differencing: chunks of m items, merged pairwise against each other.

    Starts with n / m tuples of m consecutive items. The two whose loads spread most are merged,
    the heaviest of one with the lightest of the other, until one tuple is left. O(m^2 + n) for
    each of n / m - 1 merges. Far better than greedy where items are alike, optimal for packs of
    two, and bad where single items are heavier than most packs.

    References:
        W. Michiels, J. Korst, E. Aarts and J. van Leeuwen, "Performance ratios for the
        differencing method applied to the balanced number partitioning problem", STACS 2003.
    """
    if order.ndim > 1:
        return lane_by_lane(differencing, weight, order, num_packs)
    items = order.reshape(-1, num_packs)
    chunk = jnp.arange(items.shape[0], dtype=jnp.int32)

    def merge(_: Array | int, tuples: _Tuples) -> _Tuples:
        sums, tuple_of, items = tuples
        spread = jnp.max(sums, axis=1) - jnp.min(sums, axis=1)
        spread = jnp.where(tuple_of == chunk, spread, -1)
        one = first_equal(spread, jnp.max(spread))
        spread = jnp.where(chunk == one, -2, spread)
        other = first_equal(spread, jnp.max(spread))
        heavy, light = jax.vmap(falling)(sums[jnp.stack([one, other])])
        light = light[::-1]
        merged = sums[one][heavy] + sums[other][light]
        turned = jnp.where((tuple_of == other)[:, None], items[:, light], items)
        items = jnp.where((tuple_of == one)[:, None], items[:, heavy], turned)
        sums = jnp.where((chunk == one)[:, None], merged, sums)
        return _Tuples(sums, jnp.where(tuple_of == other, one, tuple_of), items)

    units = fixed_point(weight, items.shape[0], LOAD_BITS)
    end = lax.fori_loop(0, items.shape[0] - 1, merge, _Tuples(units[items], chunk, items))
    return Constructed(end.items.T, loads_of(units, end.items.T))


@dataclass(frozen=True)
class BestOf:
    """The packing of several constructions whose heaviest pack is lightest, lane by lane."""

    constructions: tuple[Construction, ...]

    def __call__(
        self, weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
    ) -> Constructed:
        """Construct with each."""
        units = fixed_point(weight, weight.shape[0] // num_packs, LOAD_BITS)
        results = []
        for construction in self.constructions:
            contents = construction(weight, order, num_packs).contents
            results.append(Constructed(contents, loads_of(units, contents)))

        def lighter(one: Constructed, other: Constructed) -> Constructed:
            better = jnp.max(other.loads, axis=0) < jnp.max(one.loads, axis=0)
            return jax.tree.map(lambda x, y: jnp.where(better, y, x), one, other)

        return reduce(lighter, results)


@dataclass(frozen=True)
class BestStart:
    """The optimum where there are few packings, else the better of differencing and greedy."""

    greedy: Construction = quantised_greedy

    def __call__(
        self, weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
    ) -> Constructed:
        """Construct."""
        if ways(weight.shape[0], num_packs) <= MOST_WAYS:
            return exhaustive(weight, order, num_packs)
        return BestOf((differencing, self.greedy))(weight, order, num_packs)
