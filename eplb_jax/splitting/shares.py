"""Shares of replicas for balanced GPUs: the linear program of a flexible split, by descent."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import sanitise

_OVERSTEP = 1.3  # step size over the safe one; with momentum, steps below 4/3 converge


@partial(jax.jit, static_argnames=("num_gpus", "steps"))
def split_of_layers(
    load: Float[Array, "*TL E"],
    phy2log: Int32[Array, "*L R"],
    logcnt: Int32[Array, "*L E"],
    start: Float[Array, "*TL R"] | None = None,
    *,
    num_gpus: int,
    steps: int,
) -> Float[Array, "*TL R"]:
    """The shares of `runtime.split_load`."""
    split = partial(split_of_layer, num_gpus=num_gpus, steps=steps)
    signature = "(e),(r),(e)->(r)" if start is None else "(e),(r),(e),(r)->(r)"
    phy2log = jnp.broadcast_to(phy2log, (*load.shape[:-1], phy2log.shape[-1]))
    arrays = sanitise(load), phy2log, jnp.broadcast_to(logcnt, load.shape)
    if start is not None:
        arrays = *arrays, jnp.broadcast_to(start, phy2log.shape)
    return jnp.vectorize(split, signature=signature)(*arrays)


class _Descent(NamedTuple):
    """Loads of the slots whose share can vary, in units of the mean GPU load."""

    age: Float[Array, ""]  # steps since momentum was restarted
    ahead: Float[Array, " m"]  # where the next gradient is taken
    now: Float[Array, " m"]


def split_of_layer(
    load: Float[Array, " E"],
    phy2log: Int32[Array, " R"],
    logcnt: Int32[Array, " E"],
    start: Float[Array, " R"] | None = None,
    *,
    num_gpus: int,
    steps: int,
) -> Float[Array, " R"]:
    """The shares of `runtime.split_load` for one layer, whose loads are `sanitised`."""
    num_experts, num_slots = load.shape[0], phy2log.shape[0]
    # The maximum number of slots of experts with replicas.
    width = min(2 * (num_slots - num_experts), num_slots)
    if width == 0:
        return jnp.ones(num_slots, jnp.float32)
    size = num_slots // num_gpus
    load = load * (num_gpus / jnp.maximum(jnp.sum(load), 1))  # the sum is 0 or at least 1
    equal = 1 / logcnt[phy2log].astype(jnp.float32)
    equal_loads = load[phy2log] * equal
    can_split = (logcnt[phy2log] > 1) & (equal_loads > 0)
    alone = jnp.sum(jnp.where(can_split, 0, equal_loads).reshape(num_gpus, size), axis=1)

    # The list of those slots; `used` is false in its padding.
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
    curvature = jnp.where(used, over_gpu(jnp.ones(width, jnp.float32)) / _OVERSTEP, 1)
    share = 1 / (curvature * over_expert(1 / curvature))

    def step(_: Array, at: _Descent) -> _Descent:
        moved = at.ahead - (alone[slot // size] + over_gpu(at.ahead)) / curvature
        # A shift restores the load of an expert; the next step corrects for the clipping.
        now = jnp.maximum(moved - share * (over_expert(moved) - total), 0)
        now = jnp.where(used, now, 0)
        uphill = jnp.sum(curvature * (at.ahead - now) * (now - at.now)) > 0
        age = jnp.where(uphill, 0, at.age)
        return _Descent(age + 1, now + age / (age + 2) * (now - at.now), now)

    def as_shares(parts: Float[Array, " m"]) -> Float[Array, " m"]:
        whole = over_expert(parts)
        return jnp.where(whole > 0, parts / jnp.where(whole > 0, whole, 1), equal[slot])

    first = equal[slot]
    if start is not None:
        first = as_shares(jnp.where(used, sanitise(start)[slot], 0))
    first = jnp.where(used, first * total, 0)
    # `jax.shard_map` needs an age that varies over devices where the load does.
    begin = _Descent(0 * jnp.sum(first), first, first)
    shares = as_shares(lax.fori_loop(0, steps, step, begin).now)
    shares = jnp.where(can_split, shares[jnp.maximum(place, 0)], equal)

    def max_load(shares: Float[Array, " R"]) -> Float[Array, ""]:
        return jnp.max(jnp.sum((shares * load[phy2log]).reshape(num_gpus, size), axis=1))

    return jnp.where(max_load(shares) > max_load(equal) * (1 + 1e-6), equal, shares)


def _sums_by(key: Int32[Array, " m"], num_keys: int) -> Callable[[Array], Array]:
    """A function of values that gives every entry the sum over all entries of its key."""

    def scatter(values: Float[Array, " m"]) -> Float[Array, " m"]:
        empty = jnp.zeros(num_keys + 1, values.dtype)
        return empty.at[key].add(values, mode="promise_in_bounds")[key]

    def compare(values: Float[Array, " m"]) -> Float[Array, " m"]:
        return jnp.sum(jnp.where(key[:, None] == key[None], values[None], 0), axis=1)

    # A scatter adds in any order on a GPU; comparing all pairs is deterministic.
    return lambda values: lax.platform_dependent(values, cpu=scatter, default=compare)
