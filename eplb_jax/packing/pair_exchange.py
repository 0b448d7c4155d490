"""The best exchange in all pairs of packs at once.

The state of a step is the number of the item in every position, and the loads of packs. Loads and
labels of items stay in tables that steps only read; ranks of the m loads are counted by m x m
comparisons.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, Key, Num

from eplb_jax.arrays import along, descending, least_row, take_rows
from eplb_jax.packing.exchange import (
    BITS,
    BITS_OF_SQUARES,
    Exchanges,
    State,
    columns,
    count_windows,
    is_duplicate,
    pack_loads,
)


class Marks(NamedTuple):
    """Sentinels larger than any load difference, which is below 2 ** (bits + 1).

    Attributes:
        anything: At least any difference.
        single: Added to both sides for one item, so that one against two differ by `anything`.
        never: For items that must stay: at least `anything` from whatever the other pack gives.
    """

    anything: int
    single: int
    never: int


def marks(num_windows: int) -> Marks:
    """Sized to int32, or to float32's exact integers where squares are taken."""
    anything = 2 << (BITS if num_windows == 1 else BITS_OF_SQUARES)
    return Marks(anything, 2 * anything, 4 * anything)


_UNROLLED = 16
"""Unroll up to this many exchanges of an item into one kernel. In a loop XLA:CPU does not vectorise
several windows and takes eight times as long; unrolling more takes long to compile."""


@dataclass(frozen=True)
class Pairs(Exchanges):
    """`rounds` times: pair all packs, and make the best exchange in every pair at once.

    The packs are ranked by load and paired by a schedule that changes from round to round: in even
    rounds the more loaded half with the other half, shifted by one each time; in odd ones as in a
    round-robin tournament, which pairs any two ranks in time. With several windows even rounds rank
    by the sum of loads, odd ones by each window in turn; those without load, which come last, have
    no turn. The best 1-swap, or with `two` the best of 1-swaps and 2-swaps, is the one after which
    the loads of the pair differ least, in squares over windows. A duplicate that the other pack of
    its pair can take moves there first, whatever the
    loads. O(T c^2 m) a round, with `two` O(T c^4 m).
    """

    rounds: int
    two: bool = True

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Exchange in all pairs."""
        del key
        if self.rounds == 0:  # JAX cannot index a schedule without rounds
            return state
        num_windows, capacity, num_packs = state.value.shape
        value = jnp.moveaxis(state.value, 0, -1).reshape(-1, num_windows)
        table = _Table(value, state.label.ravel() if labelled else None)
        ranks = jnp.asarray(schedule(num_packs, self.rounds))
        count = count_windows(state.value)

        def round_of(i: Array | int, parts: _Parts) -> _Parts:
            packs = _join(parts)
            turn = jnp.asarray(i, jnp.int32) // 2 % count
            total = jnp.sum(packs.load, axis=1, dtype=jnp.int32)
            load = jnp.where(jnp.asarray(i, jnp.int32) % 2 == 0, total, packs.load[:, turn])
            order = take_rows(descending(load), ranks[i])
            packs, rest = _split(_Packs(columns(packs.item, order), take_rows(packs.load, order)))
            return _exchange(packs, table, self.two), rest

        number = jnp.arange(capacity * num_packs, dtype=jnp.int32).reshape(capacity, num_packs)
        start = _split(_Packs(number, pack_loads(state.value).T))
        number = _join(lax.fori_loop(0, self.rounds, round_of, start)).item
        flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        return State(*(columns(x, number) for x in flat))


class _Table(NamedTuple):
    """The items by their first position. Windows are the last axis, as rows are gathered."""

    value: Int32[Array, "n T"]
    label: Int32[Array, " n"] | None

    def values(self, item: Int32[Array, "*r"]) -> Int32[Array, "T *r"]:
        """The loads of some items."""
        if self.value.shape[1] == 1:
            return take_rows(self.value[:, 0], item)[None]
        return jnp.moveaxis(take_rows(self.value, item), -1, 0)


class _Packs(NamedTuple):
    """The number of the item in every position, and the loads of every pack."""

    item: Int32[Array, "c m"]
    load: Int32[Array, "m T"]


_Parts = tuple[_Packs, _Packs]
"""Carry of `Pairs`: the paired packs, first partners first, and what is left over if m is odd."""


def _split(packs: _Packs) -> _Parts:
    paired = packs.item.shape[1] // 2 * 2
    first, rest = slice(paired), slice(paired, None)
    return _Packs(packs.item[:, first], packs.load[first]), _Packs(
        packs.item[:, rest], packs.load[rest]
    )


def _join(parts: _Parts) -> _Packs:
    item = jnp.concatenate([x.item for x in parts], axis=1)
    return _Packs(item, jnp.concatenate([x.load for x in parts]))


def schedule(num_packs: int, rounds: int) -> np.ndarray:
    """Ranks in the order in which they are paired, int32 [rounds, m].

    The first h = m // 2 are the partners of the next h, each of the higher load; with odd m the
    last has no partner.
    """
    half, players = num_packs // 2, num_packs + num_packs % 2
    table = np.empty((rounds, num_packs), np.int32)
    for i in range(rounds):
        turn = i // 2
        if i % 2 == 0:
            high = np.arange(half)
            low = num_packs - 1 - (high + turn) % half
        else:  # the circle method: the last player stays, the others rotate
            ring = np.roll(np.arange(players - 1), -turn)
            facing = np.append(players - 1, ring[::-1][: players // 2 - 1])
            couples = np.sort([ring[: players // 2], facing], axis=0)
            high, low = couples[:, couples[1] < num_packs]
        rest = np.setdiff1d(np.arange(num_packs), [*high, *low])
        table[i] = [*high, *low, *rest]
    return table


def _exchange(packs: _Packs, table: _Table, two: bool) -> _Packs:
    """The best exchange in every pair: of pack i with pack h + i."""
    capacity, half = packs.item.shape[0], packs.item.shape[1] // 2
    load = packs.load.T
    anything = marks(len(load)).anything
    limit = _distance(load[:, :half] - load[:, half:])
    fixed = jnp.zeros(packs.item.shape, bool)
    if table.label is not None:
        fixed, urgent = _fixed_by_labels(take_rows(table.label, packs.item))
        limit = jnp.where(urgent, _distance(jnp.full_like(load[:, :half], anything)), limit)

    first, last = bundles_of(capacity, two=two)
    chosen = _best_exchange(load, table.values(packs.item), fixed, (first, last), limit)
    # A bundle is coded by its first and its last position, which are the same for one item.
    code = jnp.asarray(first * capacity + last)[chosen]
    at = jnp.where(chosen < 0, -1, jnp.stack([code // capacity, code % capacity]))
    given = along(packs.item, jnp.maximum(at, 0), 0)
    weight = take_rows(table.value, given)
    weight = weight[0] + jnp.where((at[0] != at[1])[:, None], weight[1], 0)
    change = jnp.where(chosen[:, None] < 0, 0, jnp.roll(weight, half, axis=0) - weight)
    item = packs.item
    for position, new in zip(at, jnp.roll(given, half, axis=1), strict=True):
        here = jnp.arange(capacity, dtype=jnp.int32)[:, None] == position[None]
        item = jnp.where(here, new[None], item)
    return _Packs(item, packs.load + change)


def _fixed_by_labels(label: Int32[Array, "c m"]) -> tuple[Bool[Array, "c m"], Bool[Array, " h"]]:
    """Which items must stay where they are, and whether a duplicate of the pair must move.

    Items whose label the other pack has must stay; where a duplicate can move, so must all other
    items of its pack.
    """
    half = label.shape[1] // 2
    a, b = label[:, :half], label[:, half:]
    same = a[:, None] == b[None]
    known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
    movable_a, movable_b = is_duplicate(a) & ~known_a, is_duplicate(b) & ~known_b
    urgent_a = jnp.any(movable_a, axis=0)
    urgent_b = jnp.any(movable_b, axis=0) & ~urgent_a
    fixed_a = known_a | (urgent_a[None] & ~movable_a)
    fixed_b = known_b | (urgent_b[None] & ~movable_b)
    return jnp.concatenate([fixed_a, fixed_b], axis=1), urgent_a | urgent_b


def bundles_of(capacity: int, *, two: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last position of what may be exchanged: single items, then any two."""
    position = np.arange(capacity, dtype=np.int32)
    if not two or capacity < 4:
        return position, position
    one, other = np.triu_indices(capacity, k=1)
    return np.append(position, one).astype(np.int32), np.append(position, other).astype(np.int32)


def _distance(apart: Num[Array, "T *h"]) -> Num[Array, "*h"]:
    """The distance of packs: their difference, or its squares summed over windows."""
    if apart.shape[0] == 1:
        return jnp.abs(apart[0])
    return reduce(jnp.add, [jnp.square(x.astype(jnp.float32)) for x in apart])


def _best_exchange(
    load: Int32[Array, "T m"],
    value: Int32[Array, "T c m"],
    fixed: Bool[Array, "c m"],
    bundles: tuple[np.ndarray, np.ndarray],
    limit: Num[Array, " h"],
) -> Int32[Array, " m"]:
    """The bundle of every pack whose exchange leaves the least distance between the pair.

    -1 for both packs where that is not below the limit.
    """
    capacity, half = value.shape[1], value.shape[2] // 2
    one, other = (k[capacity:] for k in bundles)
    mark = marks(len(load))
    single = np.where(bundles[0] == bundles[1], mark.single, 0).astype(np.int32)[None, :, None]

    def after(side: slice, never: int) -> Array:
        """The load without a bundle, less what the partner gains by it; or `never`."""
        of_item, stays = value[..., side], fixed[:, side]
        if len(one):
            of_item = jnp.concatenate([of_item, of_item[:, one] + of_item[:, other]], axis=1)
            stays = jnp.concatenate([stays, stays[one] | stays[other]])
        weight = jnp.where(stays, never, load[:, None, side] - 2 * of_item + single)
        # Converted once for all comparisons.
        return weight if len(load) == 1 else weight.astype(jnp.float32)

    left, right = after(slice(half), mark.never), after(slice(half, None), -mark.never)
    count = right.shape[1]

    def distance(j: Array | int) -> Array:
        return _distance(left - right[:, j, None])

    if count <= _UNROLLED:
        least, partner = distance(0), jnp.zeros(left.shape[1:], jnp.int32)
        for j in range(1, count):
            lower = distance(j) < least
            partner = jnp.where(lower, j, partner)
            least = jnp.where(lower, distance(j), least)
        _, from_a, from_b = least_row(least, partner, limit)
    else:
        least = lax.fori_loop(
            1, count, lambda j, least: jnp.minimum(least, distance(j)), distance(0), unroll=4
        )
        _, from_a, _ = least_row(least, jnp.zeros(least.shape, jnp.int32), limit)
        left = along(left, jnp.maximum(from_a, 0)[None, None], 1)
        distances = _distance(left - right)
        _, from_b, _ = least_row(distances, jnp.zeros(distances.shape, jnp.int32), limit)
    # Both packs give a bundle or none does: else items are lost where kernels round floats apart.
    both = (from_a >= 0) & (from_b >= 0)
    return jnp.where(jnp.concatenate([both, both]), jnp.concatenate([from_a, from_b]), -1)
