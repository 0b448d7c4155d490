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

from eplb_jax.packing.lanes import along, falling, fixed_point, least_row, take_rows

BITS = 26
"""For the load of a pack: the difference of two that have exchanged items is less than 2 ** 27."""

BITS_OF_SQUARES = 20
"""The same for several windows: squares of what may be the least are whole numbers in float32."""

_ANYTHING = 1 << 27
"""No less than any difference of two packs."""

_SINGLE = 2 * _ANYTHING
"""Added to both packs for one item, not two: no less than `_ANYTHING` is left of it by others."""

_NEVER = 4 * _ANYTHING
"""For items that must stay; twice as much, less a `_SINGLE` and a load, still fits in an int32."""

_WRITTEN_OUT = 16
"""So many exchanges of an item are one kernel. With the index of a loop XLA:CPU does not use vector
instructions for several windows, and takes eight times as long; but more compile for long."""


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
        label: Int32[Array, "..."] | None = None,
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
        value = jnp.moveaxis(state.value, 0, -1).reshape(-1, num_windows)
        label, table = state.label.ravel(), jnp.asarray(schedule(num_packs, self.rounds))

        def round_of(i: Array | int, parts: _Parts) -> _Parts:
            place = jnp.concatenate([x.place for x in parts], axis=1)
            by_window = jnp.concatenate([x.load for x in parts])
            turn = jnp.asarray(i, jnp.int32) // 2 % num_windows
            over_all = jnp.sum(by_window, axis=1, dtype=jnp.int32)
            load = jnp.where(jnp.asarray(i, jnp.int32) % 2 == 0, over_all, by_window[:, turn])
            order = take_rows(falling(load), table[i])
            packs = _Packs(columns(place, order), take_rows(by_window, order))
            return _exchanged(packs, _Items(value, label), self.two, labelled)

        place = jnp.arange(capacity * num_packs, dtype=jnp.int32).reshape(capacity, num_packs)
        parts = _parted(_Packs(place, loads(state.value).T))
        parts = lax.fori_loop(0, self.rounds, round_of, parts)
        place = jnp.concatenate([x.place for x in parts], axis=1)
        flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        return State(*(columns(x, place) for x in flat))


class _Items(NamedTuple):
    """The items by their place at first. Windows are last, as that is how rows are gathered."""

    value: Int32[Array, "n T"]
    label: Int32[Array, " n"]

    def values(self, place: Int32[Array, "*r"]) -> Int32[Array, "T *r"]:
        """The loads of some items."""
        if self.value.shape[1] == 1:
            return take_rows(self.value[:, 0], place)[None]
        return jnp.moveaxis(take_rows(self.value, place), -1, 0)


class _Packs(NamedTuple):
    """Carry of `Pairs`: in every place the number of its item, and the loads of every pack."""

    place: Int32[Array, "c m"]
    load: Int32[Array, "m T"]


_Parts = tuple[_Packs, _Packs, _Packs]
"""Packs, those that they are paired with, and what is left over."""


def _parted(packs: _Packs) -> _Parts:
    half = packs.place.shape[1] // 2
    part = lambda at: _Packs(packs.place[:, at], packs.load[at])  # noqa: E731
    return part(slice(half)), part(slice(half, 2 * half)), part(slice(2 * half, None))


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


def _exchanged(packs: _Packs, items: _Items, two: bool, labelled: bool) -> _Parts:
    """The best exchange in every pair."""
    a, b, bye = _parted(packs)
    capacity, half = a.place.shape
    limit = _length((a.load - b.load).T)
    barred_a = barred_b = jnp.zeros(a.place.shape, bool)
    if labelled:
        label_a, label_b = (take_rows(items.label, x.place) for x in (a, b))
        same = label_a[:, None] == label_b
        known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
        urgent = repeats(label_a) & ~known_a, repeats(label_b) & ~known_b
        urgent_a = jnp.any(urgent[0], axis=0)
        urgent_b = jnp.any(urgent[1], axis=0) & ~urgent_a
        barred_a = known_a | (urgent_a & ~urgent[0])
        barred_b = known_b | (urgent_b & ~urgent[1])
        limit = jnp.where(urgent_a | urgent_b, _length(jnp.full_like(a.load.T, _ANYTHING)), limit)

    value = items.values(packs.place[:, : 2 * half])
    chosen = _best_exchange(
        _Side(a.load.T, value[..., :half], barred_a),
        _Side(b.load.T, value[..., half:], barred_b),
        _bundles(capacity, two=two),
        limit,
    )
    out = [_at_place(a.place, k) for k in chosen.from_a]
    into = [_at_place(b.place, k) for k in chosen.from_b]
    # An item that is named twice is weighed once.
    second = chosen.from_a[0] != chosen.from_a[-1]
    change = take_rows(items.value, into[0]) - take_rows(items.value, out[0])
    if len(out) > 1:
        other = take_rows(items.value, into[1]) - take_rows(items.value, out[1])
        change += jnp.where(second[:, None], other, 0)
    change = jnp.where(chosen.from_a[0][:, None] < 0, 0, change)

    def put(place: Array, at: _Places, new: list[Array]) -> Array:
        for one, item in zip(at, new, strict=True):
            here = jnp.arange(capacity, dtype=jnp.int32)[:, None] == one
            place = jnp.where(here, item, place)
        return place

    return (
        _Packs(put(a.place, chosen.from_a, into), a.load + change),
        _Packs(put(b.place, chosen.from_b, out), b.load - change),
        bye,
    )


def _at_place(x: Num[Array, "*T c h"], place: Int32[Array, " h"]) -> Num[Array, "*T h"]:
    """What every pack holds at its place."""
    place = place.reshape((1,) * (x.ndim - 1) + place.shape)
    return along(x, place, -2).squeeze(-2)


_Places = tuple[Int32[Array, " h"], ...]


class _Exchange(NamedTuple):
    """One or two places on both sides of every pair, one twice for one item; -1: no exchange."""

    from_a: _Places
    from_b: _Places


def _length(apart: Num[Array, "T *h"]) -> Num[Array, "*h"]:
    """How far apart packs are: their difference, or its squares added up over windows."""
    if apart.shape[0] == 1:
        return jnp.abs(apart[0])
    return reduce(jnp.add, [jnp.square(x.astype(jnp.float32)) for x in apart])


class _Side(NamedTuple):
    """The loads of packs, those of their items, and which items must stay."""

    load: Int32[Array, "T h"]
    value: Int32[Array, "T c h"]
    barred: Bool[Array, "c h"]

    def after(self, bundles: tuple[np.ndarray, ...], never: int) -> Num[Array, "T s h"]:
        """What the pack weighs without a bundle, and its partner more with it; or `never`."""
        value, barred = self.value, self.barred
        single = np.where(bundles[0] == bundles[-1], _SINGLE, 0).astype(np.int32)[:, None]
        if len(single) > value.shape[1]:
            one, other = (k[value.shape[1] :] for k in bundles)
            value = jnp.concatenate([value, value[:, one] + value[:, other]], axis=1)
            barred = jnp.concatenate([barred, barred[one] | barred[other]])
        load = jnp.where(barred, never, self.load[:, None] - 2 * value + single)
        # Squares are of whole numbers in floats, made once and not in every comparison.
        return load if len(load) == 1 else load.astype(jnp.float32)


def _bundles(capacity: int, *, two: bool) -> tuple[np.ndarray, ...]:
    """The first and the last place of what may be exchanged: of one item each, then of any two."""
    place = np.arange(capacity, dtype=np.int32)
    if not two or capacity < 4:
        return (place,)
    return tuple(np.append(place, k).astype(np.int32) for k in np.triu_indices(capacity, k=1))


def _best_exchange(
    a: _Side, b: _Side, bundles: tuple[np.ndarray, ...], limit: Num[Array, " h"]
) -> _Exchange:
    """The exchange of as many items for as many that leaves least between a pair.

    None where that is not less than the limit.
    """
    left, right = a.after(bundles, _NEVER), b.after(bundles, -_NEVER)
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
        left = _at_place(left, jnp.maximum(from_a, 0))
        lengths = _length(left[:, None] - right)
        _, from_b, _ = least_row(lengths, jnp.zeros(lengths.shape, jnp.int32), limit)

    def places(one: Int32[Array, " h"]) -> _Places:
        return tuple(jnp.where(one < 0, -1, jnp.asarray(k)[one]) for k in bundles)

    return _Exchange(places(from_a), places(from_b))
