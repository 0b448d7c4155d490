"""A layer with a plan, as `complete_plan` and `improve_plan` see it: loads, times and moves."""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import LOAD_BITS, fixed_point, normalise, take_rows, unfused
from eplb_jax.types import Topology


class Layer(NamedTuple):
    """What stays the same while a plan changes. Expert E is none: it has no load."""

    units: Float[Array, "E1 T"]  # load of every expert, in units that add up to less than 2^30
    home: Int32[Array, "E1 W"]  # bit g % 32 of word g // 32: GPU g has it in the plan in place
    pace: Float[Array, " m"] | None  # time of a unit on every GPU, 0 without slots; None: 1
    level: Float[Array, " T"]  # time of every GPU if all take the same
    scale: Float[Array, ""]  # of times, for squares


class Plan(NamedTuple):
    """The experts of a plan and what follows from them."""

    expert: Int32[Array, "c m"]
    gpu: Int32[Array, " m"]  # which GPU every column is
    replicas: Int32[Array, " E1"]  # number of replicas
    share: Int32[Array, "E1 T"]  # load of each of them
    load: Int32[Array, "m T"]  # of every GPU
    moves: Int32[Array, ""]  # slots with an expert that its GPU does not have in place


def to_grid(slots: Int32[Array, " R"], topology: Topology, empty: int) -> Int32[Array, "c m"]:
    """The slots of every GPU as a column; `empty` where there is no slot, and for -1."""
    slots = jnp.where(slots < 0, empty, slots)
    if isinstance(topology.slots, int):
        return slots.reshape(topology.num_gpus, topology.slots).T
    position, none = _positions(topology), topology.num_replicas
    return jnp.append(slots, empty)[jnp.asarray(np.where(position < 0, none, position))]


def from_grid(grid: Int32[Array, "c m"], topology: Topology) -> Int32[Array, " R"]:
    """The inverse of `to_grid`."""
    if isinstance(topology.slots, int):
        return grid.T.ravel()
    position = _positions(topology)
    row, gpu = (x[np.argsort(position[position >= 0])] for x in np.nonzero(position >= 0))
    return grid[jnp.asarray(row), jnp.asarray(gpu)]


def _positions(topology: Topology) -> np.ndarray:
    """The number of every slot in a grid, int32 [c, m]; -1 where there is none."""
    slots = np.array(topology.slots_of_gpu)
    row = np.arange(slots.max(), dtype=np.int32)[:, None]
    first = (np.cumsum(slots) - slots).astype(np.int32)
    return np.where(row < slots, first + row, -1)


def layer_of(
    windows: Float[Array, "T E"],
    old: Int32[Array, " R"],
    topology: Topology,
    speed: Float[Array, " G"] | None,
) -> Layer:
    """The layer of these loads, with a plan in place; -1 in slots that were empty."""
    num_experts = windows.shape[1]
    units = fixed_point(normalise(windows, (0, 1)), num_experts, LOAD_BITS)
    total = jnp.sum(units, axis=1, dtype=jnp.int32).astype(jnp.float32)
    units = jnp.concatenate([units, jnp.zeros_like(units[:, :1])], axis=1)
    pace, capacity = None, topology.num_gpus
    if speed is not None:
        pace = jnp.where(speed > 0, 1 / jnp.where(speed > 0, speed, 1), 0)
        capacity = ordered(speed)
    home = _homes(to_grid(old, topology, num_experts), num_experts)
    one = jnp.ones((), jnp.float32)
    return Layer(units.T.astype(jnp.float32), home, pace, total / capacity, one)


def _homes(expert: Int32[Array, "c m"], empty: int) -> Int32[Array, "E1 W"]:
    """The GPUs of every expert as bits."""
    gpu = jnp.arange(expert.shape[1], dtype=jnp.int32)
    held = jnp.zeros((empty + 1, -(-gpu.size // 32) * 32), jnp.int32)
    held = held.at[expert, gpu[None]].max(1)
    bit = jnp.left_shift(1, jnp.arange(32, dtype=jnp.int32))
    return jnp.sum(held.reshape(empty + 1, -1, 32) * bit[None, None], axis=2, dtype=jnp.int32)


def plan_of(layer: Layer, slots: Int32[Array, " R"], topology: Topology) -> Plan:
    """The plan with these experts; -1 in slots that are empty."""
    empty, gpu = len(layer.units) - 1, jnp.arange(topology.num_gpus, dtype=jnp.int32)
    expert = to_grid(slots, topology, empty)
    count = jnp.zeros(empty + 1, jnp.int32).at[expert].add(1)
    share = share_of(layer.units, count)
    load = jnp.sum(take_rows(share, expert), axis=0, dtype=jnp.int32)
    moved = ~is_home(jnp.moveaxis(take_rows(layer.home, expert), -1, 0), gpu[None])
    moves = jnp.sum(moved & (expert < empty), dtype=jnp.int32)
    return Plan(expert, gpu, count, share, load, moves)


def is_home(bits: Int32[Array, "W *n"], gpu: Int32[Array, "..."]) -> Bool[Array, "..."]:
    """Whether experts with these rows of `home` are on these GPUs in the plan in place."""
    word = reduce(jnp.bitwise_or, [jnp.where(gpu // 32 == i, x, 0) for i, x in enumerate(bits)])
    return (lax.shift_right_logical(word, jnp.broadcast_to(gpu % 32, word.shape)) & 1) > 0


def share_of(units: Float[Array, "E1 T"], count: Int32[Array, " E1"]) -> Int32[Array, "E1 T"]:
    """The load of each replica of experts that have so many."""
    inverse = 1 / jnp.maximum(count, 1).astype(jnp.float32)
    return (units * inverse[:, None]).astype(jnp.int32)


def ordered(terms: Array) -> Array:
    """The sum over the first axis, one term after the other, without a loop."""
    return reduce(jnp.add, [terms[i] for i in range(len(terms))])


def load_times(layer: Layer, plan: Plan) -> Float[Array, "m T"]:
    """The time of every GPU."""
    load = plan.load.astype(jnp.float32)
    return load if layer.pace is None else unfused(load * layer.pace[plan.gpu][:, None])


def imbalance_of(layer: Layer, plan: Plan) -> Float[Array, ""]:
    """Max / mean GPU time - 1, of windows added up."""
    return relative(layer, jnp.max(load_times(layer, plan), axis=0))


def relative(layer: Layer, most: Float[Array, "T *k"]) -> Float[Array, "*k"]:
    """The imbalance of plans with these maximum times."""
    most, level = ordered(most), ordered(layer.level)
    return jnp.where(level > 0, most / jnp.where(level > 0, level, 1), 1) - 1
