"""A better plan within few moves of the one in place.

A walk from the plan in place. A round pairs all GPUs, finds the best swap of two slots in every
pair, and makes those whose gain per move is near the best of the round; every third round then
changes slots to other experts, which changes replica counts. The gain is the decrease of the
squares of GPU times above the target, over GPUs and windows. Of all plans on the way, also those
within a round, the result is the first that reaches the target, or the one nearest to it.

The walk does not depend on the limit of moves, so a higher limit is never worse. A move is a slot
with an expert that its GPU does not have in the plan in place. Loads are whole numbers, and floats
are added in a fixed order: the plan of a layer does not depend on the layers planned with it.

As in `eplb_jax.packing.exchange`, the slots of a GPU are rows and GPUs are columns. The columns are
in another order after every round; `gpu` says which they are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.packing.exchange import columns
from eplb_jax.transition.expert_changes import change_experts
from eplb_jax.transition.layer import (
    Layer,
    from_grid,
    imbalance_of,
    layer_of,
    plan_of,
    to_grid,
)
from eplb_jax.transition.relabel import slots_kept
from eplb_jax.transition.slot_swaps import pairing, swap_slots
from eplb_jax.transition.walk import BITS, Best, Goal, Walk, above_target, cost_of
from eplb_jax.types import Topology

_ROUNDS = 24
"""Maximum number of rounds."""

_PATIENCE = 8
"""Number of rounds without a change after which a layer ends."""

_BETWEEN = 3
"""Number of rounds from one that changes experts to the next."""

_NEAR, _LEAST_NEAR, _NEARER = 0.5, 0.1, 0.7
"""Share of the best gain per move below which swaps and changes wait for a later round: in the
first round and in late ones, and its factor from round to round."""

_COMPLETE = 0.95
"""Share of the excess of its pair that a swap must remove at first."""


class _Rounds(NamedTuple):
    """The number of the round and all layers."""

    step: Int32[Array, ""]
    walks: Walk


def improve_plan(
    windows: Float[Array, "L T E"],
    start: Int32[Array, "L R"],
    old: Int32[Array, "L R"],
    goal: Goal,
    *,
    topology: Topology,
    hierarchical: bool,
    speed: Float[Array, " G"] | None = None,
    rounds: int = _ROUNDS,
    two: bool = False,
) -> tuple[Int32[Array, "L R"], Float[Array, " L"], Int32[Array, " L"]]:
    """The expert in every slot, its imbalance or the target if that is more, and its moves.

    Args:
        windows: Loads to fit.
        start: The plan to begin with; -1 in slots that stay empty.
        old: The plan in place, from which moves are counted; -1 in slots that were empty.
        goal: Target, limit and penalty.
        topology: GPUs, slots and nodes.
        hierarchical: Whether experts stay on their nodes.
        speed: Tokens per second of every GPU, relative to the others; None: equal.
        rounds: Maximum number of rounds.
        two: Whether to swap two slots for two as well.
    """
    goal = goal._replace(target=jnp.maximum(goal.target, 0))
    begin = partial(_begin, topology=topology)
    each = Goal(0, 0, None)  # pyright: ignore[reportArgumentType]
    layers, walks = jax.vmap(begin, (0, 0, 0, each, None))(windows, start, old, goal, speed)
    node = topology.node_of_gpu if hierarchical else np.zeros(topology.num_gpus, np.int32)
    pairs, half = pairing(node, rounds)
    pairs, node = jnp.asarray(pairs), jnp.asarray(node)
    nearness = np.maximum(_NEAR * _NEARER ** np.arange(rounds), _LEAST_NEAR)
    nearness = jnp.asarray(nearness, jnp.float32)
    swap = jax.vmap(partial(swap_slots, node=node, half=half, two=two), (0, 0, each, None, None))
    change = jax.vmap(partial(change_experts, node=node, bound=hierarchical), (0, 0, each, None))

    def is_open(walks: Walk) -> Bool[Array, " L"]:
        return (walks.best.cost > goal.target) & (walks.failed < _PATIENCE)

    def goes_on(state: _Rounds) -> Bool[Array, ""]:
        return (state.step < rounds) & jnp.any(is_open(state.walks))

    def round_of(state: _Rounds) -> _Rounds:
        step, walks = state
        near = nearness[step]
        after = lax.cond(
            step % _BETWEEN == 0, lambda x: change(layers, x, goal, near), lambda x: x, walks
        )
        if half:
            after = swap(layers, after, goal, near, pairs[step])
        else:
            after = after._replace(failed=after.failed + 1)
        still = is_open(walks)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(still.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return _Rounds(step + 1, jax.tree.map(keep, after, walks))

    end = lax.while_loop(goes_on, round_of, _Rounds(jnp.zeros((), jnp.int32), walks)).walks.best

    def in_order(best: Best, old: Int32[Array, " R"]) -> Int32[Array, " R"]:
        number = jnp.arange(best.gpu.size, dtype=jnp.int32)
        expert = columns(best.expert, jnp.zeros_like(number).at[best.gpu].set(number))
        empty = windows.shape[2]
        kept = jax.vmap(slots_kept, 1, 1)(expert, to_grid(old, topology, empty))
        expert = jnp.take_along_axis(expert, kept, axis=0)
        return from_grid(jnp.where(expert == empty, -1, expert), topology)

    return jax.vmap(in_order)(end, old), end.cost, end.moves


def _begin(
    windows: Float[Array, "T E"],
    start: Int32[Array, " R"],
    old: Int32[Array, " R"],
    goal: Goal,
    speed: Float[Array, " G"] | None,
    *,
    topology: Topology,
) -> tuple[Layer, Walk]:
    layer = layer_of(windows, old, topology, speed)
    plan = plan_of(layer, start, topology)
    largest = jnp.maximum(jnp.max(above_target(layer, plan, goal)), 1)
    # The next power of two, from the exponent.
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32
    )
    layer = layer._replace(scale=jnp.minimum(2.0 ** (BITS - 1) / power, 1))
    cost = cost_of(imbalance_of(layer, plan), plan.moves, goal)
    zero, one = jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)
    best = Best(plan.expert, plan.gpu, cost, plan.moves)
    return layer, Walk(plan, best, zero, _COMPLETE * one, 0 * one)


def plan_cost(
    windows: Float[Array, "L T E"],
    new: Int32[Array, "L R"],
    old: Int32[Array, "L R"],
    *,
    topology: Topology,
    speed: Float[Array, " G"] | None = None,
) -> tuple[Float[Array, " L"], Int32[Array, " L"]]:
    """The imbalance of a plan, of windows added up, and the moves to it from the plan in place."""

    def of_layer(windows: Array, new: Array, old: Array) -> tuple[Array, Array]:
        layer = layer_of(windows, old, topology, speed)
        plan = plan_of(layer, new, topology)
        return imbalance_of(layer, plan), plan.moves

    return jax.vmap(of_layer)(windows, new, old)
