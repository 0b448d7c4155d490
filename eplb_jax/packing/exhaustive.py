"""The optimal packing, by enumeration: for instances with few packings."""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from eplb_jax.arrays import first_equal, loads_of
from eplb_jax.packing.constructions import Constructed, lane_by_lane
from eplb_jax.packing.items import Items

MAX_PACKINGS = 1000
"""Up to this many packings all are tried."""


def num_packings(num_items: int, num_packs: int) -> int:
    """The number of ways to pack items into packs that are all alike."""
    capacity = num_items // num_packs
    return math.factorial(num_items) // (
        math.factorial(capacity) ** num_packs * math.factorial(num_packs)
    )


@cache
def every_packing(num_items: int, num_packs: int) -> np.ndarray:
    """All packings, int32 [packings, m, c]."""

    def fill(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not items:
            yield ()
            return
        for chosen in itertools.combinations(items[1:], num_items // num_packs - 1):
            left = tuple(x for x in items[1:] if x not in chosen)
            for others in fill(left):
                yield ((items[0], *chosen), *others)

    return np.array(list(fill(tuple(range(num_items)))), np.int32)


@lane_by_lane
def exhaustive(items: Items, order: Int32[Array, " n"], num_packs: int) -> Constructed:
    """The packing with the least maximum load, by trying all; the order decides among equals."""
    packings = jnp.asarray(every_packing(order.shape[0], num_packs))
    loads = jnp.sum(items.units[order][packings], axis=2, dtype=jnp.int32)
    largest = jnp.max(loads, axis=1)
    contents = order[packings[first_equal(largest, jnp.min(largest))]]
    return Constructed(contents, loads_of(items.units, contents))
