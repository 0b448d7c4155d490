"""The best exchange in all pairs of packs at once.

The state of a step is the number of the item in every place, and the loads of packs. What is known
of the items stays in tables, from which a step reads the loads that it compares, so that it writes
little; ranks of the m loads are counted by m x m comparisons.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, Key, Num

from eplb_jax.arrays import along, falling, least_row, take_rows
from eplb_jax.packing.exchange import (
    BITS,
    BITS_OF_SQUARES,
    Exchanges,
    State,
    columns,
    loads,
    repeats,
)


class Marks(NamedTuple):
    """Numbers above any difference of loads, which is less than 2 ** (bits + 1).

    Attributes:
        anything: No less than any difference.
        single: Added to both packs for one item, not two: against two, it leaves `anything`.
        never: For items that must stay: `anything` is left of it, whatever the other pack gives.
    """

    anything: int
    single: int
    never: int


def marks(num_windows: int) -> Marks:
    """What fits in an int32, or exactly in a float32 where squares are taken."""
    anything = 2 << (BITS if num_windows == 1 else BITS_OF_SQUARES)
    return Marks(anything, 2 * anything, 4 * anything)


_WRITTEN_OUT = 16
"""So many exchanges of an item are one kernel. With the index of a loop XLA:CPU does not use vector
instructions for several windows, and takes eight times as long; but more compile for long."""


@dataclass(frozen=True)
class Pairs(Exchanges):
    """`rounds` times: pair all packs, and make the best exchange in every pair at once.

    The packs are ranked by load and paired by a schedule that changes from round to round: on
    even rounds heavy with light, shifted by one each time, on odd ones as in a tournament, which
    brings any two ranks together in time. With several windows even rounds rank by their sum, odd
    ones by each in turn. The best exchange of one item for one, or with `two` of two for two, is
    the one after which the loads of the pair differ least, in squares over windows. A repeat that
    the other pack of a pair can take goes there first, whatever the loads. O(T c^2 m) a round,
    with `two` O(T c^4 m).
    """

    rounds: int
    two: bool = True

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Exchange in all pairs."""
        del key
        num_windows, capacity, num_packs = state.value.shape
        value = jnp.moveaxis(state.value, 0, -1).reshape(-1, num_windows)
        items = _Items(value, state.label.ravel() if labelled else None)
        table = jnp.asarray(schedule(num_packs, self.rounds))

        def round_of(i: Array | int, parts: _Parts) -> _Parts:
            place = jnp.concatenate([x.place for x in parts], axis=1)
            by_window = jnp.concatenate([x.load for x in parts])
            turn = jnp.asarray(i, jnp.int32) // 2 % num_windows
            over_all = jnp.sum(by_window, axis=1, dtype=jnp.int32)
            load = jnp.where(jnp.asarray(i, jnp.int32) % 2 == 0, over_all, by_window[:, turn])
            order = take_rows(falling(load), table[i])
            packs, bye = _parted(_Packs(columns(place, order), take_rows(by_window, order)))
            return _exchanged(packs, items, self.two), bye

        place = jnp.arange(capacity * num_packs, dtype=jnp.int32).reshape(capacity, num_packs)
        parts = _parted(_Packs(place, loads(state.value).T))
        parts = lax.fori_loop(0, self.rounds, round_of, parts)
        place = jnp.concatenate([x.place for x in parts], axis=1)
        flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        return State(*(columns(x, place) for x in flat))


class _Items(NamedTuple):
    """The items by their place at first. Windows are last, as that is how rows are merge_windows."""

    value: Int32[Array, "n T"]
    label: Int32[Array, " n"] | None

    def values(self, place: Int32[Array, "*r"]) -> Int32[Array, "T *r"]:
        """The loads of some items."""
        if self.value.shape[1] == 1:
            return take_rows(self.value[:, 0], place)[None]
        return jnp.moveaxis(take_rows(self.value, place), -1, 0)


class _Packs(NamedTuple):
    """Carry of `Pairs`: in every place the number of its item, and the loads of every pack."""

    place: Int32[Array, "c m"]
    load: Int32[Array, "m T"]


_Parts = tuple[_Packs, _Packs]
"""Pairs, the heavier packs before the lighter ones, and what is left over."""


def _parted(packs: _Packs) -> _Parts:
    paired = packs.place.shape[1] // 2 * 2
    part = lambda at: _Packs(packs.place[:, at], packs.load[at])  # noqa: E731
    return part(slice(paired)), part(slice(paired, None))


def schedule(num_packs: int, rounds: int) -> np.ndarray:
    """Ranks in the order in which they are paired, int32 [rounds, m].

    The first h = m // 2 are the heavier partners of the next h; with odd m the last has a bye.
    """
    half, players = num_packs // 2, num_packs + num_packs % 2
    table = np.empty((rounds, num_packs), np.int32)
    for i in range(rounds):
        turn = i // 2
        if i % 2 == 0:
            heavy = np.arange(half)
            light = num_packs - 1 - (heavy + turn) % half
        else:  # the circle method: the last player stays, the others go round
            ring = np.roll(np.arange(players - 1), -turn)
            facing = np.append(players - 1, ring[::-1][: players // 2 - 1])
            couples = np.sort([ring[: players // 2], facing], axis=0)
            heavy, light = couples[:, couples[1] < num_packs]
        bye = np.setdiff1d(np.arange(num_packs), [*heavy, *light])
        table[i] = [*heavy, *light, *bye]
    return table


def _exchanged(packs: _Packs, items: _Items, two: bool) -> _Packs:
    """The best exchange in every pair: of pack i with pack h + i."""
    capacity, half = packs.place.shape[0], packs.place.shape[1] // 2
    load = packs.load.T
    anything = marks(len(load)).anything
    limit = _length(load[:, :half] - load[:, half:])
    barred = jnp.zeros(packs.place.shape, bool)
    if items.label is not None:
        barred, urgent = _barred(take_rows(items.label, packs.place))
        limit = jnp.where(urgent, _length(jnp.full_like(load[:, :half], anything)), limit)

    first, last = bundles_of(capacity, two=two)
    chosen = _best_exchange(load, items.values(packs.place), barred, (first, last), limit)
    # One number stands for a bundle: its first place, then its last, which is the same for one.
    places = jnp.asarray(first * capacity + last)[chosen]
    at = jnp.where(chosen < 0, -1, jnp.stack([places // capacity, places % capacity]))
    gone = along(packs.place, jnp.maximum(at, 0), 0)
    weight = take_rows(items.value, gone)
    weight = weight[0] + jnp.where((at[0] != at[1])[:, None], weight[1], 0)
    change = jnp.where(chosen[:, None] < 0, 0, jnp.roll(weight, half, axis=0) - weight)
    place, come = packs.place, jnp.roll(gone, half, axis=1)
    for one, item in zip(at, come, strict=True):
        here = jnp.arange(capacity, dtype=jnp.int32)[:, None] == one
        place = jnp.where(here, item, place)
    return _Packs(place, packs.load + change)


def _barred(label: Int32[Array, "c m"]) -> tuple[Bool[Array, "c m"], Bool[Array, " h"]]:
    """Which items must stay where they are, and whether a repeat of the pair must go.

    Those that the other pack has must stay; and where a repeat can go, all others of its side.
    """
    half = label.shape[1] // 2
    a, b = label[:, :half], label[:, half:]
    same = a[:, None] == b
    known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
    urgent = repeats(a) & ~known_a, repeats(b) & ~known_b
    urgent_a = jnp.any(urgent[0], axis=0)
    urgent_b = jnp.any(urgent[1], axis=0) & ~urgent_a
    barred_a = known_a | (urgent_a & ~urgent[0])
    barred_b = known_b | (urgent_b & ~urgent[1])
    return jnp.concatenate([barred_a, barred_b], axis=1), urgent_a | urgent_b


def bundles_of(capacity: int, *, two: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last place of what may be exchanged: of one item each, then of any two."""
    place = np.arange(capacity, dtype=np.int32)
    if not two or capacity < 4:
        return place, place
    one, other = np.triu_indices(capacity, k=1)
    return np.append(place, one).astype(np.int32), np.append(place, other).astype(np.int32)


def _length(apart: Num[Array, "T *h"]) -> Num[Array, "*h"]:
    """How far apart packs are: their difference, or its squares added up over windows."""
    if apart.shape[0] == 1:
        return jnp.abs(apart[0])
    return reduce(jnp.add, [jnp.square(x.astype(jnp.float32)) for x in apart])


def _best_exchange(
    load: Int32[Array, "T m"],
    value: Int32[Array, "T c m"],
    barred: Bool[Array, "c m"],
    bundles: tuple[np.ndarray, np.ndarray],
    limit: Num[Array, " h"],
) -> Int32[Array, " m"]:
    """The bundle of every pack whose exchange leaves least between the pair.

    -1 for both where that is not less than the limit.
    """
    capacity, half = value.shape[1], value.shape[2] // 2
    one, other = (k[capacity:] for k in bundles)
    mark = marks(len(load))
    single = np.where(bundles[0] == bundles[1], mark.single, 0).astype(np.int32)[:, None]

    def after(side: slice, never: int) -> Array:
        """What a pack weighs without a bundle, and its partner more with it; or `never`."""
        of_item, stays = value[..., side], barred[:, side]
        if len(one):
            of_item = jnp.concatenate([of_item, of_item[:, one] + of_item[:, other]], axis=1)
            stays = jnp.concatenate([stays, stays[one] | stays[other]])
        weight = jnp.where(stays, never, load[:, None, side] - 2 * of_item + single)
        # Squares are of whole numbers in floats, made once and not in every comparison.
        return weight if len(load) == 1 else weight.astype(jnp.float32)

    left, right = after(slice(half), mark.never), after(slice(half, None), -mark.never)
    count = right.shape[1]
    length = lambda j: _length(left - right[:, j, None])  # noqa: E731
    if count <= _WRITTEN_OUT:
        least, partner = length(0), jnp.zeros(left.shape[1:], jnp.int32)
        for j in range(1, count):
            lower = length(j) < least
            partner = jnp.where(lower, j, partner)
            least = jnp.where(lower, length(j), least)
        _, from_a, from_b = least_row(least, partner, limit)
    else:
        against = lambda j, least: jnp.minimum(least, length(j))  # noqa: E731
        least = lax.fori_loop(1, count, against, length(0), unroll=4)
        _, from_a, _ = least_row(least, jnp.zeros(least.shape, jnp.int32), limit)
        left = along(left, jnp.maximum(from_a, 0)[None, None], 1)
        lengths = _length(left - right)
        _, from_b, _ = least_row(lengths, jnp.zeros(lengths.shape, jnp.int32), limit)
    return jnp.concatenate([from_a, from_b])
