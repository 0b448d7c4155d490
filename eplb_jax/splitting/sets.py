"""Sets of GPUs, and the loads that cannot leave them."""

from functools import cache
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import ranks

MOST_GPUS = 12
"""Number of GPUs up to which all sets are looked at for a bound: 4,095."""


@cache
def all_sets(num_gpus: int) -> np.ndarray:
    """Which GPUs are in each set, bool [2^G - 1, G]: all sets but the empty one."""
    number = np.arange(1, 1 << num_gpus)
    return (number[:, None] >> np.arange(num_gpus)) & 1 == 1


@cache
def small_sets(num_gpus: int, most: int) -> np.ndarray:
    """All sets of up to so many GPUs, bool [M, G]."""
    gpu = np.arange(num_gpus)
    sizes = range(1, most + 1)
    return np.array([np.isin(gpu, x) for size in sizes for x in combinations(gpu, size)])


def experts_on_gpus(
    phy2log: Int32[Array, " R"], num_experts: int, num_gpus: int
) -> Int32[Array, "E G"]:
    """The number of replicas of every expert on every GPU."""
    gpu = jnp.arange(phy2log.size, dtype=jnp.int32) // (phy2log.size // num_gpus)
    expert = jnp.where(phy2log < 0, num_experts, phy2log)  # in no slot
    return jnp.zeros((num_experts, num_gpus), jnp.int32).at[expert, gpu].add(1, mode="drop")


def replicas_outside(count: Int32[Array, "E G"], sets: Bool[Array, "M G"]) -> Float[Array, "M E"]:
    """The number of replicas that every expert has outside of every set; small whole numbers."""
    outside = (~sets).astype(jnp.float32)
    return jnp.dot(outside, count.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)


def loads_inside(units: Float[Array, "T E"], outside: Float[Array, "M E"]) -> Float[Array, "M T"]:
    """The load that cannot leave a set: of experts without a replica outside of it.

    Loads are whole numbers that add up to less than 2^24, so that float32 sums are exact.
    """
    inside = (outside == 0).astype(jnp.float32)
    return jnp.dot(inside, units.T, precision=lax.Precision.HIGHEST)


def ranks_of(value: Float[Array, " m"]) -> Int32[Array, " m"]:
    """The rank of every value, largest first."""
    return ranks(lax.bitcast_convert_type(value, jnp.int32))  # of floats that are not negative


def prefix_ratios(
    load: Float[Array, " E"], phy2log: Int32[Array, " R"], gpu_load: Float[Array, " G"]
) -> tuple[Float[Array, " G"], Int32[Array, " G"]]:
    """The load that cannot leave the most loaded 1, 2, ... G GPUs, over their number.

    Of the loads of an optimal split, the largest ratio is the maximum load. Of those of any split
    it is a lower bound of what is possible.

    Args:
        load: Of every expert.
        phy2log: The plan.
        gpu_load: The loads of GPUs under a split.

    Returns:
        The ratios, and the rank of every GPU.
    """
    num_gpus = gpu_load.shape[0]
    place = ranks(lax.bitcast_convert_type(gpu_load, jnp.int32))  # as loads are not negative
    gpu = jnp.arange(phy2log.size, dtype=jnp.int32) // (phy2log.size // num_gpus)
    # An expert cannot leave the sets that hold its least loaded GPU.
    expert = jnp.where(phy2log < 0, load.shape[0], phy2log)  # in no slot
    last = jnp.full(load.shape, num_gpus, jnp.int32).at[expert].min(0, mode="drop")
    last = last.at[expert].max(place[gpu], mode="drop")
    by_place = jnp.zeros(num_gpus + 1, load.dtype).at[last].add(load)
    size = jnp.arange(1, num_gpus + 1, dtype=jnp.float32)
    return jnp.cumsum(by_place[:num_gpus]) / size, place


def tight_sets(
    load: Float[Array, "T E"], phy2log: Int32[Array, " R"], gpu_load: Float[Array, "T G"], most: int
) -> Bool[Array, "T K G"]:
    """The sets with the largest ratios of every window, so many of them."""

    def of_window(load: Array, gpu_load: Array) -> Bool[Array, "K G"]:
        ratio, place = prefix_ratios(load, phy2log, gpu_load)
        last = lax.top_k(ratio, min(most, ratio.shape[0]))[1]
        return place[None] <= last[:, None]

    return jax.vmap(of_window)(load, gpu_load)
