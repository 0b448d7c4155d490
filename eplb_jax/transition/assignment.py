"""The assignment problem: rows to columns, maximum total value."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from eplb_jax.arrays import first_equal

MAX_TOTAL = 1 << 29
"""Limit of n * max(value) up to which prices stay in int32."""

_FAR = 1 << 30


class _Matching(NamedTuple):
    """The row of every column, -1 where it has none, and the prices that prove it optimal."""

    row: Int32[Array, " n"]
    row_price: Int32[Array, " n"]
    column_price: Int32[Array, " n"]


class _Tree(NamedTuple):
    """Shortest paths from a free row to columns.

    `slack` is the distance of every column from the tree, `parent` the column before it on its path
    (n for the free row). `rows` and `columns` are those in the tree, `column` is added next.
    """

    row_price: Int32[Array, " n"]
    column_price: Int32[Array, " n"]
    slack: Int32[Array, " n"]
    parent: Int32[Array, " n"]
    rows: Bool[Array, " n"]
    columns: Bool[Array, " n"]
    column: Int32[Array, ""]


class _Path(NamedTuple):
    """The matching so far, and the next column of the path to reassign."""

    row: Int32[Array, " n"]
    column: Int32[Array, ""]


def assignment(value: Int32[Array, "n n"]) -> Int32[Array, " n"]:
    """The column of every row, all distinct, of maximum total value.

    Maximises ``sum_i value[i, column[i]]`` over permutations, exactly, by successive shortest
    paths. Deterministic, ties included. O(n^3); under `jax.vmap` all wait for the slowest.

    Args:
        value: Non-negative, with n * max(value) at most `MAX_TOTAL`.

    Returns:
        The column of every row, int32 [n].

    Example:
        >>> value = jnp.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]], jnp.int32)
        >>> assignment(value).tolist()
        [0, 2, 1]

    References:
        H. W. Kuhn, "The Hungarian method for the assignment problem", Naval Research Logistics
        Quarterly 2, 1955; R. Jonker and A. Volgenant, "A shortest augmenting path algorithm for
        dense and sparse linear assignment problems", Computing 38, 1987.
    """
    n = value.shape[0]
    zero = jnp.zeros(n, jnp.int32)
    if n == 0:
        return zero

    def add(row: Array | int, matching: _Matching) -> _Matching:
        return _add_row(value, jnp.asarray(row, jnp.int32), matching)

    row = lax.fori_loop(0, n, add, _Matching(zero - 1, zero, zero)).row
    return zero.at[row].set(jnp.arange(n, dtype=jnp.int32))


def _add_row(value: Int32[Array, "n n"], free: Int32[Array, ""], matching: _Matching) -> _Matching:
    """Match one more row, along the shortest path to a free column."""
    n = value.shape[0]
    index = jnp.arange(n, dtype=jnp.int32)

    def row_of(row: Array, column: Array) -> Array:
        return jnp.where(column == n, free, row[column % n])

    def grow(tree: _Tree) -> _Tree:
        row = row_of(matching.row, tree.column)
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

    def is_matched(tree: _Tree) -> Array:
        return row_of(matching.row, tree.column) >= 0

    def reassign(path: _Path) -> _Path:
        before = tree.parent[path.column]
        row = row_of(path.row, before)
        return _Path(jnp.where(index == path.column, row, path.row), before)

    far, root, none = jnp.full(n, _FAR, jnp.int32), jnp.full(n, n, jnp.int32), jnp.zeros(n, bool)
    start = _Tree(*matching[1:], far, root, none, none, root[0])
    tree = lax.while_loop(is_matched, grow, start)
    last = _Path(matching.row, tree.column)
    row = lax.while_loop(lambda path: path.column < n, reassign, last).row
    return _Matching(row, tree.row_price, tree.column_price)
