"""The assignment problem: rows to columns, largest total value."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from eplb_jax.arrays import first_equal

_FAR = 1 << 29


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
