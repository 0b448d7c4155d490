"""The list of moves from one plan to another: what stays, and where the rest comes from."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Int64

from eplb_jax.arrays import first_equal
from eplb_jax.checks import LoadLike, as_count, as_experts, is_concrete
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement, Topology, check_topology

STAYS, SAME_GPU, SAME_NODE, OTHER_NODE = range(4)
"""Where a slot's expert comes from: the slot itself, its GPU, its node, or another node."""

_NEVER = 1 << 30


class Moves(NamedTuple):
    """The moves from one plan to another, with the leading axes of the plans.

    Weights in slot order follow by ``weights[source]``, layer by layer.

    Attributes:
        source: The old slot that every new slot takes its expert from; itself where it stays.
        reach: Where that is: `STAYS`, `SAME_GPU`, `SAME_NODE` or `OTHER_NODE`.
        copies: Number of slots of each reach.
        sent: Number of experts that every GPU gives to other GPUs.
        received: Number of experts that it takes from other GPUs.
    """

    source: Int32[Array, "*L R"]
    reach: Int32[Array, "*L R"]
    copies: Int32[Array, "*L 4"]
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

    copies: Int64[np.ndarray, "*L 4"]
    sent: Int64[np.ndarray, "*L G"]
    received: Int64[np.ndarray, "*L G"]


def moves(old: Placement | LoadLike, new: Placement | LoadLike, topology: Topology) -> Moves:
    """List the moves that lead from one plan to another.

    A slot that keeps its expert stays. Others take it from their own GPU, else from their node,
    else from another node; of several such GPUs, from the one with the fewest moves so far, the
    lowest slot first. O(R^2) a layer.

    Args:
        old: The plan in place, or its phy2log, [L, R] or [R].
        new: The next plan, or its phy2log, of the same shape.
        topology: GPUs, slots and nodes; as many slots as the plans have.

    Returns:
        Source and reach of every slot, and totals of layers and GPUs. Inside `jax.jit` an expert
        that `old` lacks has the source -1, from another node.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The plans or the topology differ in shape, or `new` has an expert that `old`
            lacks.

    Example:
        >>> result = moves([[0, 1, 2, 3]], [[0, 2, 3, 2]], Topology(2, slots=2))
        >>> result.source.tolist(), result.copies.tolist()
        ([[0, 2, 3, 2]], [[1, 2, 1, 0]])
    """
    before = as_experts(old, "old")
    after = as_experts(new, "new", before.shape)
    check_topology(topology, before.shape[-1])
    if before.ndim == 1:
        return Moves(*(x[0] for x in moves(before[None], after[None], topology)))
    if is_concrete(before) and is_concrete(after):
        for layer, (x, y) in enumerate(zip(np.asarray(before), np.asarray(after), strict=True)):
            for expert in np.setdiff1d(y, x)[:1]:
                raise ValueError(f"new has expert {expert} in layer {layer}, but old does not")
    return _moves(before, after, topology=topology)


class _Sources(NamedTuple):
    """The sources so far, and how many experts every GPU gives for them."""

    source: Int32[Array, " R"]
    sent: Int32[Array, " G"]


@by_layers
@partial(jax.jit, static_argnames="topology")
def _moves(old: Int32[Array, "L R"], new: Int32[Array, "L R"], *, topology: Topology) -> Moves:
    return jax.vmap(partial(_moves_of_layer, topology=topology))(old, new)


def _moves_of_layer(
    old: Int32[Array, " R"], new: Int32[Array, " R"], *, topology: Topology
) -> Moves:
    num_slots, num_gpus = topology.num_replicas, topology.num_gpus
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    gpu = slot // topology.slots
    node = gpu // topology.gpus_per_node

    def reach_from(source: Array, target: Array) -> Array:
        far = jnp.where((node[source] == node[target]) & (source >= 0), SAME_NODE, OTHER_NODE)
        near = jnp.where((gpu[source] == gpu[target]) & (source >= 0), SAME_GPU, far)
        return jnp.where(source == target, STAYS, near).astype(jnp.int32)

    def add(target: Array | int, sources: _Sources) -> _Sources:
        target = jnp.asarray(target, jnp.int32)
        reach = reach_from(slot, target)
        sent = jnp.where(reach >= SAME_NODE, sources.sent[gpu], 0)
        cost = jnp.where(old == new[target], reach * num_slots + sent, _NEVER)
        least = jnp.min(cost)
        source = jnp.where(least < _NEVER, first_equal(cost, least), -1)
        sends = ((reach[source] >= SAME_NODE) & (source >= 0)).astype(jnp.int32)
        return _Sources(
            sources.source.at[target].set(source), sources.sent.at[gpu[source]].add(sends)
        )

    start = _Sources(slot, jnp.zeros(num_gpus, jnp.int32))
    source, sent = lax.fori_loop(0, num_slots, add, start)
    reach = reach_from(source, slot)
    received = jnp.zeros(num_gpus, jnp.int32).at[gpu].add((reach >= SAME_NODE).astype(jnp.int32))
    copies = jnp.zeros(4, jnp.int32).at[reach].add(1)
    return Moves(source, reach, copies, sent, received)
