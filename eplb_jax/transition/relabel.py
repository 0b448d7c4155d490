"""A plan renumbered: which GPU gets which part of it, so that few slots change.

GPUs of a node are alike, and so are nodes: numbering them otherwise changes no load, only how many
experts move.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from eplb_jax.sharding import by_layers
from eplb_jax.transition.assignment import MAX_TOTAL, assignment
from eplb_jax.types import Replication, Topology


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical"))
def relabel(
    new: Replication, old: Int32[Array, "L R"], *, topology: Topology, hierarchical: bool
) -> Replication:
    """`new` with GPUs and slots renumbered so that as many slots as possible keep their expert.

    In a hierarchical plan, GPUs are matched for every pair of an old and a new node, then nodes.
    Otherwise any GPU may take the place of any other; among choices that keep equally many slots,
    the one with most of the moved experts on their old node is taken. (Above about 23,000 slots,
    where both numbers do not fit in an int32, nodes are ignored.) An expert that its GPU had
    before keeps the slot.
    """
    num_experts = new.logcnt.shape[1]
    num_gpus, num_slots = topology.num_gpus, topology.num_replicas
    num_nodes = topology.num_nodes if hierarchical else 1
    gpus_of_node = num_gpus // num_nodes
    by_gpu = num_gpus, topology.slots_per_gpu
    prefer_node = num_nodes < topology.num_nodes and num_slots * (num_slots + 1) <= MAX_TOTAL

    def layer(
        expert: Int32[Array, " R"], rank: Int32[Array, " R"], old: Int32[Array, " R"]
    ) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
        old = old.reshape(by_gpu)
        before = replicas_on_gpus(old, num_experts) > 0
        after = replicas_on_gpus(expert.reshape(by_gpu), num_experts) > 0
        value = _shared(before, after)
        if prefer_node:  # all that is on the node, one slot that stays counting for more
            nodes = before.reshape(topology.num_nodes, topology.gpus_per_node, num_experts)
            on_node = jnp.repeat(jnp.any(nodes, axis=1), topology.gpus_per_node, axis=0)
            value = num_slots * value + _shared(on_node, after)
        # [old node, new node, old GPU of it, new GPU of it]
        value = value.reshape(num_nodes, gpus_of_node, num_nodes, gpus_of_node)
        value = value.transpose(0, 2, 1, 3)
        inside = jax.vmap(jax.vmap(assignment))(value)
        kept = jnp.take_along_axis(value, inside[..., None], axis=3)
        node = assignment(jnp.sum(kept, axis=(2, 3), dtype=jnp.int32))
        gpu = inside[jnp.arange(num_nodes, dtype=jnp.int32), node] + gpus_of_node * node[:, None]
        expert, rank = (x.reshape(by_gpu)[gpu.reshape(num_gpus)] for x in (expert, rank))
        slot = jax.vmap(slots_kept)(expert, old)
        expert, rank = (jnp.take_along_axis(x, slot, axis=1) for x in (expert, rank))
        return expert.ravel(), rank.ravel()

    expert, rank = jax.vmap(layer)(new.phy2log, new.rank, old)
    return Replication(expert, rank, new.logcnt)


def replicas_on_gpus(expert: Int32[Array, "m c"], num_experts: int) -> Int32[Array, "m E"]:
    """How many replicas of every expert every GPU has."""
    gpu = jnp.arange(expert.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((expert.shape[0], num_experts), jnp.int32).at[gpu, expert].add(1)


def _shared(old: Bool[Array, "m E"], new: Bool[Array, "m E"]) -> Int32[Array, "m m"]:
    """How many experts every old GPU has in common with every new one; exact in float32."""
    old, new = (x.astype(jnp.float32) for x in (old, new))
    return jnp.matmul(old, new.T, precision="highest").astype(jnp.int32)


def slots_kept(new: Int32[Array, " c"], old: Int32[Array, " c"]) -> Int32[Array, " c"]:
    """Which of a GPU's new experts goes to every slot: one it had stays, the rest in turn."""
    same = (old[:, None] == new[None]) & _first(new)[None]
    stays = same & _first(old)[:, None]  # slot by expert, at most one in a row and in a column
    free, moved = ~jnp.any(stays, axis=1), ~jnp.any(stays, axis=0)
    slot_turn, expert_turn = (jnp.cumsum(x, dtype=jnp.int32) for x in (free, moved))
    filled = free[:, None] & moved[None] & (slot_turn[:, None] == expert_turn[None])
    return jnp.argmax(stays | filled, axis=1).astype(jnp.int32)


def _first(x: Int32[Array, " c"]) -> Bool[Array, " c"]:
    """Where no earlier entry is the same."""
    slot = jnp.arange(x.shape[0], dtype=jnp.int32)
    return ~jnp.any((x[:, None] == x[None]) & (slot[:, None] > slot[None]), axis=1)
