"""From one plan to the next: the same packs under the labels that keep most copies in place.

GPUs of one node are alike, and so are nodes: which pack of a plan goes to which of them costs no
balance, but decides how many copies of experts have to be fetched.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from eplb_jax.packing.lanes import first_equal
from eplb_jax.sharding import by_layers
from eplb_jax.types import Replication

_FAR = 1 << 29


@by_layers
@partial(jax.jit, static_argnames=("num_gpus", "num_nodes"))
def relabelled(
    new: Replication, old: Int32[Array, "L R"], *, num_gpus: int, num_nodes: int
) -> Replication:
    """`new` with nodes, GPUs of a node and slots of a GPU named so that most copies stay.

    Nodes are matched with nodes, and within them GPUs with GPUs, by exact assignments. An expert
    that its GPU held before keeps the slot.
    """
    num_experts = new.logcnt.shape[1]
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


class _Tree(NamedTuple):
    """Shortest paths from a free row: the rows and columns reached, and the column reached last.

    ``slack`` is how much a column is from being reached, ``parent`` the reached column before it;
    `n` stands for the free row itself.
    """

    row_price: Int32[Array, " n"]
    column_price: Int32[Array, " n"]
    slack: Int32[Array, " n"]
    parent: Int32[Array, " n"]
    rows: Bool[Array, " n"]
    columns: Bool[Array, " n"]
    column: Int32[Array, ""]


class _Matching(NamedTuple):
    """The row of every column, -1 where there is none; prices that prove it optimal."""

    row: Int32[Array, " n"]
    row_price: Int32[Array, " n"]
    column_price: Int32[Array, " n"]


class _Path(NamedTuple):
    """Rows that are moved along a path, from its last column."""

    row: Int32[Array, " n"]
    column: Int32[Array, ""]


def assignment(value: Int32[Array, "n n"]) -> Int32[Array, " n"]:
    """The column of every row, all distinct, whose values add up to most.

    Successive shortest paths, O(n^3); batched, every row waits for the slowest layer.

    References:
        H. W. Kuhn, "The Hungarian method for the assignment problem", Naval Research Logistics
        Quarterly 2, 1955; R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for
        dense and sparse linear assignment problems", Computing 38, 1987.
    """
    n = value.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)

    def add(free: Array | int, matching: _Matching) -> _Matching:
        def grow(tree: _Tree) -> _Tree:
            start = tree.column == n
            row = jnp.where(start, jnp.asarray(free, jnp.int32), matching.row[tree.column % n])
            rows, columns = tree.rows | (index == row), tree.columns | (index == tree.column)
            slack = -value[row] - tree.row_price[row] - tree.column_price
            nearer = ~columns & (slack < tree.slack)
            slack = jnp.where(nearer, slack, tree.slack)
            open_slack = jnp.where(columns, _FAR, slack)
            least = jnp.min(open_slack)
            return _Tree(
                tree.row_price + jnp.where(rows, least, 0),
                tree.column_price - jnp.where(columns, least, 0),
                slack - jnp.where(columns, 0, least),
                jnp.where(nearer, tree.column, tree.parent),
                rows,
                columns,
                first_equal(open_slack, least),
            )

        def matched(tree: _Tree) -> Array:
            return (tree.column == n) | (matching.row[tree.column % n] >= 0)

        far, root = jnp.full(n, _FAR, jnp.int32), jnp.full(n, n, jnp.int32)
        none = jnp.zeros(n, bool)
        root = _Tree(*matching[1:], far, root, none, none, jnp.asarray(n, jnp.int32))
        tree = lax.while_loop(matched, grow, root)

        def shift(path: _Path) -> _Path:
            before = tree.parent[path.column]
            row = jnp.where(before == n, jnp.asarray(free, jnp.int32), path.row[before % n])
            return _Path(jnp.where(index == path.column, row, path.row), before)

        path = lax.while_loop(lambda p: p.column < n, shift, _Path(matching.row, tree.column))
        return _Matching(path.row, tree.row_price, tree.column_price)

    zero = jnp.zeros(n, jnp.int32)
    row = lax.fori_loop(0, n, add, _Matching(zero - 1, zero, zero)).row
    return jnp.zeros(n, jnp.int32).at[row].set(index)
