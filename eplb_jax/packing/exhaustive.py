"""The optimal packing, by trying every one: for instances with few of them."""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import LOAD_BITS, first_equal, fixed_point, loads_of
from eplb_jax.packing.constructions import Constructed, lane_by_lane

MOST_WAYS = 1000
"""Up to so many packings are all tried."""


def ways(num_items: int, num_packs: int) -> int:
    """In how many ways items go into packs, all alike."""
    capacity = num_items // num_packs
    return math.factorial(num_items) // (
        math.factorial(capacity) ** num_packs * math.factorial(num_packs)
    )


@cache
def every_packing(num_items: int, num_packs: int) -> np.ndarray:
    """All of them, int32 [ways, m, c]."""

    def fill(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not items:
            yield ()
            return
        for chosen in itertools.combinations(items[1:], num_items // num_packs - 1):
            left = tuple(x for x in items[1:] if x not in chosen)
            for others in fill(left):
                yield ((items[0], *chosen), *others)

    return np.array(list(fill(tuple(range(num_items)))), np.int32)


def exhaustive(
    weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
) -> Constructed:
    """The optimum, by trying every packing: for groups of experts on a few nodes.

    The order decides among equals. Up to `MOST_WAYS` packings.
    """
    if order.ndim > 1:
        return lane_by_lane(exhaustive, weight, order, num_packs)
    packings = jnp.asarray(every_packing(order.shape[0], num_packs))
    units = fixed_point(weight, packings.shape[2], LOAD_BITS)
    heaviest = jnp.max(jnp.sum(units[order][packings], axis=2, dtype=jnp.int32), axis=1)
    contents = order[packings[first_equal(heaviest, jnp.min(heaviest))]]
    return Constructed(contents, loads_of(units, contents))
