"""Splitting the load at hand over the replicas of every expert, so that GPUs come out even."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import sanitise
from eplb_jax.checks import LoadLike, as_count, as_load, check_divides
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import Placement

OVERSTEP = 1.3
"""Steps over the safe one, 1 / split slots of a GPU; with momentum they converge below 4/3."""


def split_load(
    load: LoadLike, placement: Placement, num_gpus: int, *, steps: int = 64
) -> Float[Array, "*L R"]:
    """What share of its expert's load every slot should take, for the load at hand.

    A plan is made for an even split and for a load that has passed. Once tokens are routed, and
    before they are sent, another split of the same plan evens out GPUs further: the lightest
    possible heaviest GPU is a linear program, which this solves to a few parts in 10^4, where
    experts with replicas link GPUs in long chains to a part in 200. `to_physical` follows it by
    ``choice="split"``.

    Descends on the squares of GPU loads, whose least sum also has the lightest heaviest GPU, by
    projected gradient steps with momentum and restarts, each O(R). 64 steps of 58 layers of 256
    experts in 288 slots on 32 GPUs take 1.5 ms on a CPU core.

    Args:
        load: [L, E], or [E] for the plan of one layer: loads in any unit, summed over all GPUs.
        placement: The plan.
        num_gpus: G; divides R.
        steps: 32 are enough for plans of `rebalance_experts`; chains of GPUs want more.

    Returns:
        Shares, float32 [L, R] or [R], that add up to 1 over the slots of an expert; even ones where
        it has no load. No heavier GPU than by even shares, to rounding.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load and plan do not fit, num_gpus does not divide R, or a load is NaN,
            infinite or negative.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[9, 1, 1, 1]], 6, 1, 1, 3)
        >>> share = split_load([[3, 3, 1, 1]], plan, 3)
        >>> plan.phy2log.tolist(), share.round(2).tolist()
        ([[0, 2, 0, 1, 0, 3]], [[0.5, 1.0, 0.0, 1.0, 0.5, 1.0]])

    References:
        Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm (2009); O'Donoghue &
        Candes, Adaptive restart for accelerated gradient schemes (2015). DeepSeek-AI, LPLB: the
        same program by an interior-point method.
    """
    axes = ("layer", "expert")[-placement.logcnt.ndim :]
    array = jnp.asarray(as_load(load, "load", axes))
    if array.shape != placement.logcnt.shape:
        raise ValueError(
            f"load has the shape {array.shape}, but the plan is for {placement.logcnt.shape}"
        )
    num_gpus, steps = as_count("num_gpus", num_gpus), as_count("steps", steps, least=0)
    check_divides("num_gpus", num_gpus, "number of slots", placement.phy2log.shape[-1])
    split = partial(_split_load, num_gpus=num_gpus, steps=steps)
    spec = jax.sharding.PartitionSpec(*spec_of(array)[:-1])
    return under_auto(split, spec, array, placement.phy2log, placement.logcnt)


@partial(jax.jit, static_argnames=("num_gpus", "steps"))
def _split_load(
    load: Float[Array, "*L E"],
    phy2log: Int32[Array, "*L R"],
    logcnt: Int32[Array, "*L E"],
    *,
    num_gpus: int,
    steps: int,
) -> Float[Array, "*L R"]:
    split = partial(_split_of_layer, num_gpus=num_gpus, steps=steps)
    if load.ndim == 1:
        return split(sanitise(load), phy2log, logcnt)
    return jax.vmap(split)(sanitise(load), phy2log, logcnt)


class _Descent(NamedTuple):
    """Carry of the descent: loads of the slots that can be split, mean GPU = 1.

    Attributes:
        age: Steps since momentum was last stopped.
        ahead: Where momentum leads.
        now: Where the descent is.
    """

    age: Float[Array, ""]
    ahead: Float[Array, " m"]
    now: Float[Array, " m"]


def _split_of_layer(
    load: Float[Array, " E"],
    phy2log: Int32[Array, " R"],
    logcnt: Int32[Array, " E"],
    num_gpus: int,
    steps: int,
) -> Float[Array, " R"]:
    num_experts, num_slots = load.shape[0], phy2log.shape[0]
    # At most so many slots belong to experts that have several.
    width = min(2 * (num_slots - num_experts), num_slots)
    if width == 0:
        return jnp.ones(num_slots, jnp.float32)
    size = num_slots // num_gpus
    load = load * (num_gpus / jnp.maximum(jnp.sum(load), 1))  # at least 1, the largest, or none
    even = 1 / logcnt[phy2log].astype(jnp.float32)
    evenly = load[phy2log] * even
    can_split = (logcnt[phy2log] > 1) & (evenly > 0)
    alone = jnp.sum(jnp.where(can_split, 0, evenly).reshape(num_gpus, size), axis=1)

    # Those slots in a list; `used` is false where there are fewer.
    place = jnp.cumsum(can_split, dtype=jnp.int32) - 1
    all_slots = jnp.arange(num_slots, dtype=jnp.int32)
    slot = jnp.full(width, num_slots, jnp.int32)
    slot = slot.at[jnp.where(can_split, place, width)].set(all_slots, mode="drop")
    used = slot < num_slots
    slot = jnp.minimum(slot, num_slots - 1)
    number = (jnp.cumsum(logcnt > 1, dtype=jnp.int32) - 1)[phy2log[slot]]
    over_expert = _sums_by(jnp.where(used, number, width), width)
    over_gpu = _sums_by(jnp.where(used, slot // size, num_gpus), num_gpus)
    total = jnp.where(used, load[phy2log[slot]], 0)
    curvature = jnp.where(used, over_gpu(jnp.ones(width, jnp.float32)) / OVERSTEP, 1)
    share = 1 / (curvature * over_expert(1 / curvature))

    def step(_: Array, at: _Descent) -> _Descent:
        moved = at.ahead - (alone[slot // size] + over_gpu(at.ahead)) / curvature
        # One shift brings an expert's parts to its load; what the clip adds, the next step takes.
        now = jnp.maximum(moved - share * (over_expert(moved) - total), 0)
        now = jnp.where(used, now, 0)
        uphill = jnp.sum(curvature * (at.ahead - now) * (now - at.now)) > 0
        age = jnp.where(uphill, 0, at.age)
        return _Descent(age + 1, now + age / (age + 2) * (now - at.now), now)

    first = jnp.where(used, evenly[slot], 0)
    # Its age varies over devices where the load does, as `jax.shard_map` wants to see.
    start = _Descent(0 * jnp.sum(first), first, first)
    parts = lax.fori_loop(0, steps, step, start).now
    whole = over_expert(parts)
    shares = jnp.where(whole > 0, parts / jnp.where(whole > 0, whole, 1), even[slot])
    shares = jnp.where(can_split, shares[jnp.maximum(place, 0)], even)

    def heaviest(shares: Float[Array, " R"]) -> Float[Array, ""]:
        return jnp.max(jnp.sum((shares * load[phy2log]).reshape(num_gpus, size), axis=1))

    # Where one expert alone makes the heaviest GPU, all others are evened out, too.
    return jnp.where(heaviest(shares) > heaviest(even) * (1 + 1e-6), even, shares)


def _sums_by(key: Int32[Array, " m"], num_keys: int) -> Callable[[Array], Array]:
    """What gives every entry the sum over the entries of its key, at most num_keys."""

    def scattered(values: Float[Array, " m"]) -> Float[Array, " m"]:
        return (
            jnp.zeros(num_keys + 1, values.dtype).at[key].add(values, mode="promise_in_bounds")[key]
        )

    def compared(values: Float[Array, " m"]) -> Float[Array, " m"]:
        return jnp.sum(jnp.where(key[:, None] == key, values, 0), axis=1)

    # A GPU's scatter adds in any order; all pairs are one kernel that adds in one.
    return lambda values: lax.platform_dependent(values, cpu=scattered, default=compared)
