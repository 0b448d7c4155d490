"""Refinements that know which items must not meet: exchanges in all packs at once.

Items may carry labels (replicas of one expert share one); a pack that holds a label twice has a
repeat. No exchange here brings about a repeat, and repeats are removed before loads are evened.

An item has one load, or one in each of T windows of time. Then a pack has T loads too, and
exchanges lessen the squares of loads, added up over packs and windows: packs come out even in
every window, hence in those to come that mix what was seen.

The state is kept with the places of a pack as rows and the packs as columns, so that a step is
elementwise work on rows of packs, without sorts or scatters: ranks of the m loads are counted by
m x m comparisons, and what a step exchanges is put together anew.
"""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, Num

from eplb_jax.packing.lanes import falling, fixed_point, least_row, take_rows

BITS = 27
"""For the load of a pack: two of `_NEVER` and twice a difference of loads fit in an int32."""

BITS_OF_SQUARES = 20
"""The same for several windows: squares of what may be the least are whole numbers in float32."""

_NEVER = 1 << 29
_ANYTHING = 1 << 28
"""More than any difference of two packs, less than what a `_NEVER` leaves."""

class State(NamedTuple):
    """The item in every place, with its loads in fixed point and its label."""

    value: Int32[Array, "T c m"]
    item: Int32[Array, "c m"]
    label: Int32[Array, "c m"]


def columns(x: Num[Array, "*T n"], index: Int32[Array, "..."]) -> Num[Array, "..."]:
    """``x[..., index]`` for indices known to be in range."""
    return x.at[..., index].get(mode="promise_in_bounds")


def loads(value: Int32[Array, "T c m"]) -> Int32[Array, "T m"]:
    """The loads of packs."""
    return jnp.sum(value, axis=1, dtype=jnp.int32)


def repeats(label: Int32[Array, "c m"]) -> Bool[Array, "c m"]:
    """Which places hold a label that an earlier place of their pack holds."""
    earlier = np.tri(label.shape[0], k=-1, dtype=bool)[:, :, None]
    return jnp.any((label[:, None] == label) & earlier, axis=1)


class Exchanges:
    """A refinement as a function of the state."""

    keeps_labels: ClassVar[bool] = True
    sees_windows: ClassVar[bool] = True

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """The state of one packing after all steps; without labels every item has its own."""
        raise NotImplementedError

    def __call__(
        self,
        contents: Int32[Array, "m c *K"],
        weight: Float[Array, "..."],
        key: Key[Array, ""],
        label: Int32[Array, "n *K"] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        if contents.ndim > 2:
            own_weight = weight.ndim > 1 + self.sees_windows
            own_label = label is not None and label.ndim > 1
            axes = -1, -1 if own_weight else None, None, -1 if own_label else None
            return jax.vmap(self, axes, -1)(contents, weight, key, label)
        state = _state(contents, weight, label)
        return self.improve(state, key, labelled=label is not None).item.T


def _state(
    contents: Int32[Array, "m c"], weight: Float[Array, "*T n"], label: Int32[Array, " n"] | None
) -> State:
    item, n = contents.T, weight.shape[-1]
    label = jnp.arange(n, dtype=jnp.int32) if label is None else label
    windows = weight.reshape(-1, n)
    bits = BITS if windows.shape[0] == 1 else BITS_OF_SQUARES
    return State(fixed_point(windows, item.shape[0], bits)[:, item], item, label[item])


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
        known = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        table = jnp.asarray(schedule(num_packs, self.rounds))

        def round_of(i: Array | int, packs: _Packs) -> _Packs:
            together = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *packs)
            turn = jnp.asarray(i, jnp.int32) // 2 % num_windows
            over_all = jnp.sum(together.load, axis=0, dtype=jnp.int32)
            load = jnp.where(jnp.asarray(i, jnp.int32) % 2 == 0, over_all, together.load[turn])
            order = take_rows(falling(load), table[i])
            return _exchanged(_parted(together.columns(order)), known, self.two, labelled)

        place = jnp.arange(capacity * num_packs, dtype=jnp.int32).reshape(capacity, num_packs)
        packs = _parted(_Packs(place, loads(state.value)))
        packs = lax.fori_loop(0, self.rounds, round_of, packs)
        place = jnp.concatenate([x.place for x in packs], axis=1)
        return State(*(columns(x, place) for x in known))


class _Packs(NamedTuple):
    """Carry of `Pairs`: in every place the number of its item, and the loads of every pack."""

    place: Int32[Array, "c m"]
    load: Int32[Array, "T m"]

    def columns(self, index: Int32[Array, " k"]) -> "_Packs":
        """Some packs, in this order."""
        return jax.tree.map(lambda x: columns(x, index), self)


_Parts = tuple[_Packs, _Packs, _Packs]
"""Packs, those that they are paired with, and what is left over."""


def _parted(packs: _Packs) -> _Parts:
    half = packs.place.shape[1] // 2
    parts = slice(half), slice(half, 2 * half), slice(2 * half, None)
    return tuple(jax.tree.map(lambda x, at=at: x[:, at], packs) for at in parts)


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


def _exchanged(parts: _Parts, known: State, two: bool, labelled: bool) -> _Parts:
    """The best exchange in every pair."""
    a, b, bye = parts
    capacity = a.place.shape[0]
    limit = _length(a.load - b.load)
    barred_a = barred_b = jnp.zeros(a.place.shape, bool)
    if labelled:
        label_a, label_b = (columns(known.label, x.place) for x in (a, b))
        same = label_a[:, None] == label_b
        known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
        urgent = repeats(label_a) & ~known_a, repeats(label_b) & ~known_b
        urgent_a = jnp.any(urgent[0], axis=0)
        urgent_b = jnp.any(urgent[1], axis=0) & ~urgent_a
        barred_a = known_a | (urgent_a & ~urgent[0])
        barred_b = known_b | (urgent_b & ~urgent[1])
        limit = jnp.where(urgent_a | urgent_b, _length(jnp.full_like(a.load, _ANYTHING)), limit)

    sides = _Side(a, barred_a, known.value), _Side(b, barred_b, known.value)
    length, out, into = _best_exchange(*sides, (np.arange(capacity),))
    if two and capacity > 3:
        one = _Exchange(length, out.twice(), into.twice())
        other = _best_exchange(*sides, np.triu_indices(capacity, k=1))
        shorter = other.length < length
        length, out, into = jax.tree.map(lambda x, y: jnp.where(shorter, y, x), one, other)
    good = length < limit

    def put(packs: _Packs, out: _Bundle, into: _Bundle) -> _Packs:
        place = packs.place
        for at, new in zip(out.at, into.place, strict=True):
            here = good & (jnp.arange(capacity, dtype=jnp.int32)[:, None] == at)
            place = jnp.where(here, new, place)
        return _Packs(place, packs.load + jnp.where(good, into.weight - out.weight, 0))

    return put(a, out, into), put(b, into, out), bye


class _Bundle(NamedTuple):
    """One or two items of every pack: where they are, which they are, and what they weigh."""

    at: tuple[Int32[Array, " h"], ...]
    place: tuple[Int32[Array, " h"], ...]
    weight: Int32[Array, "T h"]

    def twice(self) -> "_Bundle":
        """One item named as two, as bundles of two are."""
        return _Bundle(self.at * 2, self.place * 2, self.weight)


class _Exchange(NamedTuple):
    """How far apart a pair is after an exchange, and what goes from one to the other and back."""

    length: Num[Array, " h"]
    out: _Bundle
    into: _Bundle


def _length(apart: Num[Array, "T *h"]) -> Num[Array, "*h"]:
    """How far apart packs are: their difference, or its squares added up over windows."""
    if apart.shape[0] == 1:
        return jnp.abs(apart[0])
    return reduce(jnp.add, [jnp.square(x.astype(jnp.float32)) for x in apart])


class _Side(NamedTuple):
    """Packs, which of their items must stay, and the loads of all items."""

    packs: _Packs
    barred: Bool[Array, "c h"]
    value: Int32[Array, "T n"]

    def after(self, bundles: tuple[np.ndarray, ...], barred: int) -> Num[Array, "T s h"]:
        """What the pack weighs without a bundle, and its partner more with it; or `barred`."""
        value, never = columns(self.value, self.packs.place), self.barred
        if len(bundles) > 1:
            value = reduce(jnp.add, [value[:, k] for k in bundles])
            never = reduce(jnp.logical_or, [never[k] for k in bundles])
        load = jnp.where(never, barred, self.packs.load[:, None] - 2 * value)
        # Squares are of whole numbers in floats, made once and not in every comparison.
        return load if len(load) == 1 else load.astype(jnp.float32)

    def bundle(self, bundles: tuple[np.ndarray, ...], one: Int32[Array, " h"]) -> _Bundle:
        """The bundle of this number."""
        at = tuple(take_rows(jnp.asarray(k, jnp.int32), one) for k in bundles)
        place = tuple(_at_place(self.packs.place, k) for k in at)
        weight = reduce(jnp.add, [columns(self.value, x) for x in place])
        return _Bundle(at, place, weight)


def _at_place(x: Int32[Array, "c h"], place: Int32[Array, " h"]) -> Int32[Array, " h"]:
    """What every pack holds at its place."""
    return jnp.take_along_axis(x, place[None], axis=0, mode="promise_in_bounds")[0]


def _best_exchange(a: _Side, b: _Side, bundles: tuple[np.ndarray, ...]) -> _Exchange:
    """The exchange of as many items as `bundles` has places that leaves least between a pair."""
    left, right = a.after(bundles, _NEVER), b.after(bundles, -_NEVER)

    def against(i: Array | int, least: Array) -> Array:
        return jnp.minimum(least, _length(left - right[:, i, None]))

    count = right.shape[1]
    start = _length(left - right[:, 0, None])
    # Written out, several windows take XLA:CPU an eighth of the time.
    unroll = max(count - 1, 1) if len(left) > 1 else min(max(count - 1, 1), 4)
    length, from_a = least_row(lax.fori_loop(1, count, against, start, unroll=unroll))
    out = a.bundle(bundles, from_a)
    left = (a.packs.load - 2 * out.weight).astype(left.dtype)
    _, from_b = least_row(_length(left[:, None] - right))
    return _Exchange(length, out, b.bundle(bundles, from_b))

