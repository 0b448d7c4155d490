"""From one plan to the next: the same packs under the labels that keep most copies in place.

GPUs of one node are alike, and so are nodes: which pack of a plan goes to which of them costs no
balance, but decides how many copies of experts have to be fetched.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from eplb_jax.sharding import by_layers
from eplb_jax.transition.assignment import assignment
from eplb_jax.types import Replication, Topology


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical"))
def relabel(
    new: Replication, old: Int32[Array, "L R"], *, topology: Topology, hierarchical: bool
) -> Replication:
    """`new` with nodes, GPUs of a node and slots of a GPU named so that most copies stay.

    Nodes are matched with nodes, and within them GPUs with GPUs, by exact assignments. An expert
    that its GPU held before keeps the slot.
    """
    num_experts = new.logcnt.shape[1]
    num_gpus, num_nodes = topology.num_gpus, topology.num_nodes if hierarchical else 1
    gpus_of_node = num_gpus // num_nodes

    def layer(
        expert: Int32[Array, " R"], rank: Int32[Array, " R"], old: Int32[Array, " R"]
    ) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
        capacity = old.shape[0] // num_gpus
        before = _held(old.reshape(num_gpus, capacity), num_experts)
        after = _held(expert.reshape(num_gpus, capacity), num_experts)
        shared = jnp.matmul(before, after.T, precision="highest").astype(jnp.int32)
        # [old node, new node, old GPU of it, new GPU of it]
        shape = num_nodes, gpus_of_node, num_nodes, gpus_of_node
        by_node = shared.reshape(shape).transpose(0, 2, 1, 3)
        inside = jax.vmap(jax.vmap(assignment))(by_node)
        kept = jnp.take_along_axis(by_node, inside[..., None], axis=3)
        node = assignment(jnp.sum(kept, axis=(2, 3), dtype=jnp.int32))
        gpu = inside[jnp.arange(num_nodes, dtype=jnp.int32), node] + gpus_of_node * node[:, None]
        pack = gpu.reshape(num_gpus)
        expert, rank = (x.reshape(num_gpus, capacity)[pack] for x in (expert, rank))
        slot = jax.vmap(slots_kept)(expert, old.reshape(num_gpus, capacity))
        expert, rank = (jnp.take_along_axis(x, slot, axis=1) for x in (expert, rank))
        return expert.ravel(), rank.ravel()

    expert, rank = jax.vmap(layer)(new.phy2log, new.rank, old)
    return Replication(expert, rank, new.logcnt)


def _held(expert: Int32[Array, "m c"], num_experts: int) -> Array:
    """1 where a GPU holds an expert, float32 [m, E]."""
    empty = jnp.zeros((expert.shape[0], num_experts), jnp.float32)
    return empty.at[jnp.arange(expert.shape[0], dtype=jnp.int32)[:, None], expert].set(1)


def slots_kept(new: Int32[Array, " c"], old: Int32[Array, " c"]) -> Int32[Array, " c"]:
    """Which of the new experts goes to every slot: where it was, the others in turn."""
    same = (old[:, None] == new) & _first(new)
    stays = same & _first(old)[:, None]  # slot by expert, at most one in a row and in a column
    free, moved = ~jnp.any(stays, axis=1), ~jnp.any(stays, axis=0)
    turn = lambda x: jnp.where(x, jnp.cumsum(x, dtype=jnp.int32), 0)  # noqa: E731
    filled = free[:, None] & moved & (turn(free)[:, None] == turn(moved))
    return jnp.argmax(stays | filled, axis=1).astype(jnp.int32)


def _first(x: Int32[Array, " c"]) -> Bool[Array, " c"]:
    """Where no earlier entry is the same."""
    return ~jnp.any((x[:, None] == x) & np.tri(x.shape[0], k=-1, dtype=bool), axis=1)
