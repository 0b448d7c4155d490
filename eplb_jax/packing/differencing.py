"""Constructions that compare all items at once: balanced packings for exchanges to start from."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from eplb_jax.arrays import descending, first_equal, loads_of
from eplb_jax.packing.constructions import (
    Constructed,
    Construction,
    lane_by_lane,
    quantised_greedy,
)
from eplb_jax.packing.exhaustive import MAX_PACKINGS, exhaustive, num_packings
from eplb_jax.packing.items import Items


class _Tuples(NamedTuple):
    """Carry of `differencing`.

    ``sums`` are the loads of the packs of every tuple, ``tuple_of`` the tuple that every chunk
    of m items is in, and ``items`` the item of every chunk in every pack of its tuple.
    """

    sums: Int32[Array, "c m"]
    tuple_of: Int32[Array, " c"]
    items: Int32[Array, "c m"]


@lane_by_lane
def differencing(items: Items, order: Int32[Array, " n"], num_packs: int) -> Constructed:
    """Balanced largest differencing: chunks of m items, merged pairwise against each other.

    Starts with n / m tuples of m consecutive items. The two with the largest spread of loads are
    merged, the most loaded pack of one with the least loaded of the other, until one tuple is left.
    O(m^2 + n) for each of n / m - 1 merges. Far better than greedy where items are alike, optimal
    for packs of two, and bad where single items weigh more than most packs.

    References:
        W. Michiels, J. Korst, E. Aarts and J. van Leeuwen, "Performance ratios for the
        differencing method applied to the balanced number partitioning problem", STACS 2003.
    """
    chunks = order.reshape(-1, num_packs)
    chunk = jnp.arange(chunks.shape[0], dtype=jnp.int32)

    def merge(_: Array | int, tuples: _Tuples) -> _Tuples:
        sums, tuple_of, items = tuples
        spread = jnp.max(sums, axis=1) - jnp.min(sums, axis=1)
        spread = jnp.where(tuple_of == chunk, spread, -1)
        one = first_equal(spread, jnp.max(spread))
        spread = jnp.where(chunk == one, -2, spread)
        other = first_equal(spread, jnp.max(spread))
        most, least = jax.vmap(descending)(sums[jnp.stack([one, other])])
        least = least[::-1]
        merged = sums[one][most] + sums[other][least]
        turned = jnp.where((tuple_of == other)[:, None], items[:, least], items)
        items = jnp.where((tuple_of == one)[:, None], items[:, most], turned)
        sums = jnp.where((chunk == one)[:, None], merged, sums)
        return _Tuples(sums, jnp.where(tuple_of == other, one, tuple_of), items)

    start = _Tuples(items.units[chunks], chunk, chunks)
    contents = lax.fori_loop(0, chunks.shape[0] - 1, merge, start).items.T
    return Constructed(contents, loads_of(items.units, contents))


@dataclass(frozen=True)
class BestStart:
    """The optimum where there are few packings, else the better of differencing and greedy.

    The better one has the lower maximum load, in every lane; differencing wins ties.
    """

    greedy: Construction = quantised_greedy

    def __call__(self, items: Items, order: Int32[Array, "n *K"], num_packs: int) -> Constructed:
        """Construct."""
        if num_packings(order.shape[0], num_packs) <= MAX_PACKINGS:
            return exhaustive(items, order, num_packs)
        one = differencing(items, order, num_packs)
        contents = self.greedy(items, order, num_packs).contents
        other = Constructed(contents, loads_of(items.units, contents))
        lower = jnp.max(other.loads, axis=0) < jnp.max(one.loads, axis=0)
        return jax.tree.map(lambda x, y: jnp.where(lower, y, x), one, other)
