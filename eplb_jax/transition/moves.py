"""The list of moves from one plan to another: what stays, and where the rest comes from."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, Int64
from numpy.typing import ArrayLike

from eplb_jax.arrays import first_equal
from eplb_jax.checks import LoadLike, as_count, as_experts
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement, Topology, as_topology

STAYS, SAME_GPU, SAME_NODE, OTHER_NODE, STORAGE = range(5)
"""Where a slot's expert comes from: the slot itself, its GPU, its node, another node, or storage,
where no live GPU has it."""

_NEVER = 1 << 30


class Moves(NamedTuple):
    """The moves from one plan to another, with the leading axes of the plans.

    Weights in slot order follow by ``weights[source]``, layer by layer.

    Attributes:
        source: The old slot that every new slot takes its expert from; itself where it stays or
            holds none; -1 where the expert has to be loaded from storage.
        reach: Where that is: `STAYS`, `SAME_GPU`, `SAME_NODE`, `OTHER_NODE` or `STORAGE`.
        copies: Number of slots of each reach.
        sent: Number of experts that every GPU gives to other GPUs.
        received: Number of experts that it takes from other GPUs, or from storage.
    """

    source: Int32[Array, "*L R"]
    reach: Int32[Array, "*L R"]
    copies: Int32[Array, "*L 5"]
    sent: Int32[Array, "*L G"]
    received: Int32[Array, "*L G"]

    def traffic(self, bytes_per_expert: int) -> "Traffic":
        """The totals in bytes, on the host in int64: int32 overflows at 50 experts of 44 MB.

        Example:
            >>> result = moves([0, 1, 2, 3], [0, 2, 3, 2], Topology(2, slots=2))
            >>> result.traffic(44_040_192).received.tolist()
            [44040192, 0]
        """
        size = as_count("bytes_per_expert", bytes_per_expert)
        return Traffic(*(np.asarray(x, np.int64) * size for x in self[2:]))


class Traffic(NamedTuple):
    """The totals of `Moves` in bytes."""

    copies: Int64[np.ndarray, "*L 5"]
    sent: Int64[np.ndarray, "*L G"]
    received: Int64[np.ndarray, "*L G"]


def moves(
    old: Placement | LoadLike,
    new: Placement | LoadLike,
    topology: Topology | int,
    *,
    active: ArrayLike | Array | None = None,
) -> Moves:
    """List the moves that lead from one plan to another.

    A slot that keeps its expert stays. Others take it from their own GPU, else from their node,
    else from another node, else from storage; of several such GPUs, from the one with the fewest
    moves so far, the lowest slot first. O(R^2) a layer.

    Args:
        old: The plan in place, or its phy2log, [L, R] or [R]; -1 in slots without an expert.
        new: The next plan, or its phy2log, of the same shape; likewise.
        topology: GPUs, slots and nodes, as many slots as the plans have; or the number of GPUs.
        active: Whether every GPU is alive, [G]: no expert is taken from the others. None: all.

    Returns:
        Source and reach of every slot, and totals of layers and GPUs.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The plans, the topology or `active` differ in shape.

    Example:
        >>> result = moves([[0, 1, 2, 3]], [[0, 2, 3, 2]], Topology(2, slots=2))
        >>> result.source.tolist(), result.copies.tolist()
        ([[0, 2, 3, 2]], [[1, 2, 1, 0, 0]])
    """
    before = as_experts(old, "old")
    after = as_experts(new, "new", before.shape)
    topology = as_topology(topology, before.shape[-1])
    lives = (
        jnp.ones(topology.num_gpus, bool) if active is None else jnp.asarray(active).astype(bool)
    )
    if lives.shape != (topology.num_gpus,):
        raise ValueError(f"active must have the shape ({topology.num_gpus},), got {lives.shape}")
    if before.ndim == 1:
        one = _moves(before[None], after[None], lives, topology=topology)
        return Moves(*(x[0] for x in one))
    return _moves(before, after, lives, topology=topology)


class _Sources(NamedTuple):
    """The sources so far, and how many experts every GPU gives for them."""

    source: Int32[Array, " R"]
    sent: Int32[Array, " G"]


@by_layers
@partial(jax.jit, static_argnames="topology")
def _moves(
    old: Int32[Array, "L R"],
    new: Int32[Array, "L R"],
    live: Bool[Array, " G"],
    *,
    topology: Topology,
) -> Moves:
    lives = live[jnp.asarray(topology.gpu_of_slot)]
    of_layer = partial(_moves_of_layer, topology=topology)
    return jax.vmap(of_layer)(jnp.where(lives, old, -1), new)


def _moves_of_layer(
    old: Int32[Array, " R"], new: Int32[Array, " R"], *, topology: Topology
) -> Moves:
    num_slots, num_gpus = topology.num_replicas, topology.num_gpus
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    gpu = jnp.asarray(topology.gpu_of_slot)
    node = jnp.asarray(topology.node_of_gpu)[gpu]

    def reach_from(source: Array, target: Array) -> Array:
        reach = jnp.where(node[source] == node[target], SAME_NODE, OTHER_NODE)
        reach = jnp.where(gpu[source] == gpu[target], SAME_GPU, reach)
        reach = jnp.where(source == target, STAYS, reach)
        return jnp.where(source < 0, STORAGE, reach).astype(jnp.int32)

    def add(target: Array | int, sources: _Sources) -> _Sources:
        target = jnp.asarray(target, jnp.int32)
        reach = reach_from(slot, target)
        sent = jnp.where(reach >= SAME_NODE, sources.sent[gpu], 0)
        cost = jnp.where((old == new[target]) & (old >= 0), reach * num_slots + sent, _NEVER)
        least = jnp.min(cost)
        source = jnp.where(least < _NEVER, first_equal(cost, least), -1)
        source = jnp.where(new[target] < 0, target, source)
        sends = ((reach[source] >= SAME_NODE) & (source >= 0)).astype(jnp.int32)
        return _Sources(
            sources.source.at[target].set(source), sources.sent.at[gpu[source]].add(sends)
        )

    start = _Sources(slot, jnp.zeros(num_gpus, jnp.int32))
    source, sent = lax.fori_loop(0, num_slots, add, start)
    reach = reach_from(source, slot)
    received = jnp.zeros(num_gpus, jnp.int32).at[gpu].add((reach >= SAME_NODE).astype(jnp.int32))
    copies = jnp.zeros(5, jnp.int32).at[reach].add(1)
    return Moves(source, reach, copies, sent, received)
