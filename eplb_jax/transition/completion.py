"""A plan without gaps: every expert in a slot, and an expert in every slot of a live GPU.

After a change of GPUs the plan in place has empty slots, and experts without any. The experts come
first, from the largest load: into empty slots of the least loaded GPU, or in place of the replica
whose expert is best off without it. Then the least loaded GPU with an empty slot gets the expert
with the largest load per replica that it does not have yet, until no slot is empty. From nothing,
this makes a plan that `improve_plan` can begin with.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import first_equal, take_rows, unfused
from eplb_jax.transition.layer import from_grid, layer_of, to_grid
from eplb_jax.types import Topology


class _Gaps(NamedTuple):
    """The experts so far, and their number of replicas; E is none."""

    expert: Int32[Array, "c m"]
    replicas: Int32[Array, " E1"]
    steps: Int32[Array, ""]


def complete_plan(
    load: Float[Array, "L E"],
    old: Int32[Array, "L R"],
    live: Bool[Array, " G"],
    *,
    topology: Topology,
    hierarchical: bool = False,
    speed: Float[Array, " G"] | None = None,
) -> Int32[Array, "L R"]:
    """The expert in every slot, -1 on GPUs that are not live; live slots keep what they hold.

    In a hierarchical plan, experts go to a node that holds experts of their group, as long as there
    is one with a slot for them.

    Args:
        load: Expected loads.
        old: The plan in place; -1 in empty slots.
        live: Whether a GPU takes experts. Where these have fewer than E slots, some experts get
            none.
        topology: GPUs, slots, nodes and groups.
        hierarchical: Whether groups of experts stay on their nodes.
        speed: Of every GPU; None: equal.
    """
    complete = partial(_complete, topology=topology, hierarchical=hierarchical)
    return jax.vmap(complete, (0, 0, None, None))(load, old, live, speed)


def _complete(
    load: Float[Array, " E"],
    old: Int32[Array, " R"],
    live: Bool[Array, " G"],
    speed: Float[Array, " G"] | None,
    *,
    topology: Topology,
    hierarchical: bool,
) -> Int32[Array, " R"]:
    empty, num_gpus = load.shape[0], topology.num_gpus
    layer = layer_of(load[None], old, topology, speed)
    units = layer.units[:, 0]
    busy = jnp.max(units) > 0
    units = jnp.where(busy, units, 1).at[empty].set(0)  # without load, as for equal loads
    node = jnp.asarray(topology.node_of_gpu)
    exists = to_grid(jnp.zeros_like(old), topology, empty) < empty
    usable = exists & live[None]
    start = jnp.where(usable, to_grid(old, topology, empty), empty)
    num_nodes = topology.num_nodes
    group = jnp.arange(empty, dtype=jnp.int32) // max(empty // topology.num_groups, 1)

    def nodes_of_groups(expert: Int32[Array, "c m"]) -> Bool[Array, "N groups"]:
        """Which nodes hold experts of which groups."""
        held = jnp.zeros((num_nodes, topology.num_groups + 1), bool)
        of = jnp.append(group, topology.num_groups)[expert]
        return held.at[node[None], of].set(True)[:, :-1]

    homes = nodes_of_groups(start)
    most = topology.num_replicas + empty  # so that it ends where live slots are too few

    def is_home(expert: Int32[Array, ""]) -> Bool[Array, " G"]:
        """Whether the expert's group is on the node of a GPU, or on none."""
        if not hierarchical:
            return jnp.ones(num_gpus, bool)
        held = homes[:, group[jnp.minimum(expert, empty - 1)]]
        return held[node] | ~jnp.any(held)

    def has_gaps(gaps: _Gaps) -> Bool[Array, ""]:
        gap = jnp.any(gaps.replicas[:-1] == 0) | jnp.any(usable & (gaps.expert == empty))
        return gap & (gaps.steps < most)

    def fill(gaps: _Gaps) -> _Gaps:
        expert, count, steps = gaps
        share = units / jnp.maximum(count, 1).astype(jnp.float32)
        time = jnp.sum(take_rows((share).astype(jnp.int32), expert), axis=0, dtype=jnp.int32)
        time = time.astype(jnp.float32)
        if layer.pace is not None:
            time = unfused(time * layer.pace)
        free = usable & (expert == empty)
        room = jnp.any(free, axis=0)
        missing = jnp.where(count[:-1] == 0, units[:-1], -1)
        lacks = jnp.any(count[:-1] == 0)

        # An expert without a slot: the least loaded GPU with room for it.
        lost = first_equal(missing, jnp.max(missing))
        far = jnp.where(is_home(lost), 0.0, 2.0**40)
        cost = jnp.where(room, time + far, jnp.inf)
        home = first_equal(cost, jnp.min(cost))
        # No room: the replica whose expert is best off without it, on the most loaded such GPU.
        without = units / jnp.maximum(count - 1, 1).astype(jnp.float32)
        spare = jnp.where(usable & (count[expert] > 1), without[expert] + far[None], jnp.inf)
        spare = jnp.where(spare == jnp.min(spare), -time[None], jnp.inf).ravel()
        evicted = first_equal(spare, jnp.min(spare))
        # A slot without an expert: the least loaded GPU, and the best expert that it lacks.
        cost = jnp.where(room, time, jnp.inf)
        needy = first_equal(cost, jnp.min(cost))
        has = jnp.zeros(empty + 1, bool).at[expert[:, needy]].set(True)[:-1]
        strange = ~homes[node[needy]][group] if hierarchical else jnp.zeros(empty, bool)
        value = jnp.where(has, -2.0, jnp.where(strange, -1.0, share[:-1]))
        best = first_equal(value, jnp.max(value))
        best = jnp.where(jnp.max(value) == -2, first_equal(share[:-1], jnp.max(share[:-1])), best)

        gpu = jnp.where(lacks, home, needy)
        row = first_equal(free[:, gpu].astype(jnp.int32), jnp.ones((), jnp.int32))
        slot = jnp.where(lacks & ~jnp.any(room), evicted, row * num_gpus + gpu)
        new, gone = jnp.where(lacks, lost, best), expert.ravel()[slot]
        return _Gaps(
            expert.ravel().at[slot].set(new).reshape(expert.shape),
            count.at[new].add(1).at[gone].add(-1),
            steps + 1,
        )

    count = jnp.zeros(empty + 1, jnp.int32).at[start].add(1)
    end = lax.while_loop(has_gaps, fill, _Gaps(start, count, jnp.zeros((), jnp.int32))).expert
    return from_grid(jnp.where(end == empty, -1, end), topology)
