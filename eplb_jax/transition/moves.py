"""What it takes to put a plan in place of another: what stays, and where copies come from."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Int64

from eplb_jax.arrays import first_equal
from eplb_jax.checks import LoadLike, as_count, as_experts, check_divides, is_concrete
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement

STAYS, SAME_GPU, SAME_NODE, OTHER_NODE = range(4)
"""How far a copy comes: not at all, from its GPU, from another of its node, from another node."""

_NEVER = 1 << 30


class Moves(NamedTuple):
    """From the layout of one plan to that of another.

    Weights in slot order follow it by ``weights[source]``, layer by layer.

    Attributes:
        source: The old slot that every new slot takes its expert from; its own where it stays.
        reach: How far that is: `STAYS`, `SAME_GPU`, `SAME_NODE` or `OTHER_NODE`.
        copies: How many slots of a layer have each reach.
        sent: How many copies a GPU sends to others.
        received: How many it gets from others.
    """

    source: Int32[Array, "L R"]
    reach: Int32[Array, "L R"]
    copies: Int32[Array, "L 4"]
    sent: Int32[Array, "L G"]
    received: Int32[Array, "L G"]

    def traffic(self, bytes_per_expert: int) -> "Traffic":
        """The same in bytes, in int64: an int32 would wrap at 50 copies of 44 MB.

        Example:
            >>> moves([[0, 1, 2, 3]], [[0, 2, 3, 2]], 2).traffic(44_040_192).received.tolist()
            [[44040192, 0]]
        """
        size = as_count("bytes_per_expert", bytes_per_expert)
        return Traffic(*(np.asarray(x, np.int64) * size for x in self[2:]))


class Traffic(NamedTuple):
    """`Moves` in bytes: of every reach, and sent to and received from other GPUs."""

    copies: Int64[np.ndarray, "L 4"]
    sent: Int64[np.ndarray, "L G"]
    received: Int64[np.ndarray, "L G"]


def moves(
    old: Placement | LoadLike, new: Placement | LoadLike, num_gpus: int, num_nodes: int = 1
) -> Moves:
    """The copies that lead from one plan to another.

    A slot that keeps its expert copies nothing. Others take it from their own GPU, else from their
    node, else from elsewhere; of several such GPUs, from the one that has been asked for least so
    far, the lowest slot first. O(R^2) a layer.

    Args:
        old: The plan in place, or its phy2log [L, R].
        new: The plan to come, or its phy2log [L, R].
        num_gpus: G; divides R.
        num_nodes: N; divides G.

    Returns:
        Sources and reach of every slot, and totals per layer and GPU.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The plans are of different shapes, `new` has an expert that `old` lacks, or
            counts do not divide.

    Example:
        >>> result = moves([[0, 1, 2, 3]], [[0, 2, 3, 2]], 2)
        >>> result.source.tolist(), result.copies.tolist()
        ([[0, 2, 3, 2]], [[1, 2, 1, 0]])
    """
    before = as_experts(old, "old")
    after = as_experts(new, "new", before.shape)
    num_gpus, num_nodes = as_count("num_gpus", num_gpus), as_count("num_nodes", num_nodes)
    check_divides("num_gpus", num_gpus, "number of slots", before.shape[1])
    check_divides("num_nodes", num_nodes, "num_gpus", num_gpus)
    if is_concrete(before) and is_concrete(after):
        for layer, (x, y) in enumerate(zip(np.asarray(before), np.asarray(after), strict=True)):
            for expert in np.setdiff1d(y, x)[:1]:
                raise ValueError(f"new holds expert {expert} in layer {layer}, but old does not")
    return _moves(before, after, num_gpus=num_gpus, num_nodes=num_nodes)


class _Sources(NamedTuple):
    """Carry of `_moves_of_layer`: the sources so far, and what every GPU sends for them."""

    source: Int32[Array, " R"]
    sent: Int32[Array, " G"]


@by_layers
@partial(jax.jit, static_argnames=("num_gpus", "num_nodes"))
def _moves(
    old: Int32[Array, "L R"], new: Int32[Array, "L R"], *, num_gpus: int, num_nodes: int
) -> Moves:
    return jax.vmap(lambda x, y: _moves_of_layer(x, y, num_gpus, num_nodes))(old, new)


def _moves_of_layer(
    old: Int32[Array, " R"], new: Int32[Array, " R"], num_gpus: int, num_nodes: int
) -> Moves:
    num_slots = old.shape[0]
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    gpu = slot // (num_slots // num_gpus)
    node = gpu // (num_gpus // num_nodes)

    def reach_from(source: Array, target: Array) -> Array:
        far = jnp.where(node[source] == node[target], SAME_NODE, OTHER_NODE)
        near = jnp.where(gpu[source] == gpu[target], SAME_GPU, far)
        return jnp.where(source == target, STAYS, near).astype(jnp.int32)

    def add(target: Array | int, sources: _Sources) -> _Sources:
        target = jnp.asarray(target, jnp.int32)
        reach = reach_from(slot, target)
        asked = jnp.where(reach >= SAME_NODE, sources.sent[gpu], 0)
        cost = jnp.where(old == new[target], reach * num_slots + asked, _NEVER)
        source = first_equal(cost, jnp.min(cost))
        sends = (reach[source] >= SAME_NODE).astype(jnp.int32)
        return _Sources(
            sources.source.at[target].set(source), sources.sent.at[gpu[source]].add(sends)
        )

    start = _Sources(slot, jnp.zeros(num_gpus, jnp.int32))
    source, sent = lax.fori_loop(0, num_slots, add, start)
    reach = reach_from(source, slot)
    received = jnp.zeros(num_gpus, jnp.int32).at[gpu].add((reach >= SAME_NODE).astype(jnp.int32))
    copies = jnp.zeros(4, jnp.int32).at[reach].add(1)
    return Moves(source, reach, copies, sent, received)
