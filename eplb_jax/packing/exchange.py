"""Refinements that know which items must not meet: exchanges in all packs at once.

Items may carry labels (replicas of one expert share one); a pack that holds a label twice has a
repeat. No exchange here brings about a repeat, and repeats are removed before loads are evened.

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
from jaxtyping import Array, Bool, Float, Int32, Key

from eplb_jax.packing.lanes import (
    falling,
    first_equal,
    fixed_point,
    pick,
    ranks,
    take_rows,
    where_equal,
)
from eplb_jax.packing.objective import best

BITS = 27
"""For the load of a pack: two of `_NEVER` and twice a difference of loads fit in an int32."""

_NEVER = 1 << 29
_ANYTHING = 1 << 28
"""More than any difference of two packs, less than what a `_NEVER` leaves."""


class _State(NamedTuple):
    """The item in every place, with its weight in fixed point and its label."""

    value: Int32[Array, "c m"]
    item: Int32[Array, "c m"]
    label: Int32[Array, "c m"]

    def columns(self, index: Int32[Array, " k"]) -> "_State":
        """Some packs, in this order."""
        return jax.tree.map(lambda x: take_rows(x.T, index).T, self)


def _state(
    contents: Int32[Array, "m c"], weight: Float[Array, " n"], label: Int32[Array, " n"] | None
) -> _State:
    item = contents.T
    label = jnp.arange(weight.shape[0], dtype=jnp.int32) if label is None else label
    return _State(fixed_point(weight, item.shape[0], BITS)[item], item, label[item])


def _loads(value: Int32[Array, "c m"]) -> Int32[Array, " m"]:
    return jnp.sum(value, axis=0, dtype=jnp.int32)


def _repeats(label: Int32[Array, "c m"]) -> Bool[Array, "c m"]:
    """Which places hold a label that an earlier place of their pack holds."""
    earlier = np.tri(label.shape[0], k=-1, dtype=bool)[:, :, None]
    return jnp.any((label[:, None] == label) & earlier, axis=1)


class _Exchanges:
    """A refinement as a function of the state."""

    keeps_labels: ClassVar[bool] = True

    def improve(self, state: _State, key: Key[Array, ""], *, labelled: bool) -> _State:
        """The state of one packing after all steps; without labels every item has its own."""
        raise NotImplementedError

    def __call__(
        self,
        contents: Int32[Array, "m c *K"],
        weight: Float[Array, " n"],
        key: Key[Array, ""],
        label: Int32[Array, " n"] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        if contents.ndim > 2:
            return jax.vmap(self, (-1, None, None, None), -1)(contents, weight, key, label)
        state = _state(contents, weight, label)
        return self.improve(state, key, labelled=label is not None).item.T


@dataclass(frozen=True)
class Columns(_Exchanges):
    """`steps` times: take a block of items out of every pack and deal the blocks out anew.

    A block is a stretch of h places from a random one on, h = 1 to c / 2 in turn. The heaviest
    block goes to the pack with the lightest rest: for given blocks no other assignment has a
    lighter heaviest pack or fewer squares. O(m^2 + n) a step; the best refinement for packs of
    three to five items. Labels are not looked at.
    """

    steps: int
    keeps_labels: ClassVar[bool] = False

    def improve(self, state: _State, key: Key[Array, ""], *, labelled: bool) -> _State:
        """Deal out blocks."""
        del labelled
        capacity, num_packs = state.value.shape
        offsets = jax.random.randint(key, (self.steps, num_packs), 0, capacity, jnp.int32)
        largest = max(capacity // 2, 1)
        place = jnp.arange(capacity, dtype=jnp.int32)[:, None]

        def dealt(i: Array | int, state: _State, height: int) -> _State:
            turned = (place + offsets[i * largest + height - 1]) % capacity
            turn = lambda x: jnp.take_along_axis(x, turned, axis=0)  # noqa: E731
            state = jax.tree.map(turn, state)
            block, rest = _loads(state.value[:height]), _loads(state.value[height:])
            taken = where_equal(ranks(rest), num_packs - 1 - ranks(block))
            deal = lambda x: jnp.concatenate([take_rows(x[:height].T, taken).T, x[height:]])  # noqa: E731
            return jax.tree.map(deal, state)

        def step(i: Array | int, state: _State) -> _State:
            for height in range(1, largest + 1):
                state = dealt(i, state, height)
            return state

        return lax.fori_loop(0, self.steps // largest, step, state) if self.steps else state


@dataclass(frozen=True)
class Pairs(_Exchanges):
    """`rounds` times: pair all packs, and make the best exchange in every pair at once.

    The packs are ranked by load and paired by a schedule that changes from round to round: on
    even rounds heavy with light, shifted by one each time, on odd ones as in a tournament, which
    brings any two ranks together in time. The best exchange of one item for one, or with
    `two` of two for two, is the one after which the loads of the pair differ least. A repeat that
    the other pack of a pair can take goes there first, whatever the loads. O(c^2 m) a round, with
    `two` O(c^4 m).
    """

    rounds: int
    two: bool = True

    def improve(self, state: _State, key: Key[Array, ""], *, labelled: bool) -> _State:
        """Exchange in all pairs."""
        del key
        table = jnp.asarray(schedule(state.value.shape[1], self.rounds))

        def round_of(i: Array | int, state: _State) -> _State:
            state = state.columns(take_rows(falling(_loads(state.value)), table[i]))
            return _exchanged(state, self.two, labelled)

        return lax.fori_loop(0, self.rounds, round_of, state)


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


def _exchanged(state: _State, two: bool, labelled: bool) -> _State:
    """The best exchange in every pair: of pack i with pack h + i, h = m // 2."""
    capacity, num_packs = state.value.shape
    half = num_packs // 2
    a, b, bye = (
        jax.tree.map(lambda x, at=at: x[:, at], state)
        for at in (slice(half), slice(half, 2 * half), slice(2 * half, None))
    )
    apart = limit = _loads(a.value) - _loads(b.value)
    barred_a = barred_b = jnp.zeros(a.value.shape, bool)
    if labelled:
        same = a.label[:, None] == b.label
        known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
        urgent = _repeats(a.label) & ~known_a, _repeats(b.label) & ~known_b
        urgent_a = jnp.any(urgent[0], axis=0)
        urgent_b = jnp.any(urgent[1], axis=0) & ~urgent_a
        barred_a = known_a | (urgent_a & ~urgent[0])
        barred_b = known_b | (urgent_b & ~urgent[1])
        limit = jnp.where(urgent_a | urgent_b, _ANYTHING, apart)

    place = np.arange(capacity)
    bundles: list[tuple[np.ndarray, ...]] = [(place,)]
    if two and capacity > 3:
        bundles.append(np.triu_indices(capacity, k=1))
    options = [_best_exchange(apart, a.value, b.value, barred_a, barred_b, x) for x in bundles]
    chosen = reduce(_less_apart, options)

    good, row = chosen.apart < limit, place.astype(np.int32)[:, None]

    def put(x: Array, places: _Places, there: Array, others: _Places) -> Array:
        for at, other in zip(places, others, strict=True):
            x = jnp.where(good & (row == at), pick(there, other), x)
        return x

    def put_together(a: Array, b: Array, bye: Array) -> Array:
        new_a = put(a, chosen.from_a, b, chosen.from_b)
        new_b = put(b, chosen.from_b, a, chosen.from_a)
        return jnp.concatenate([new_a, new_b, bye], axis=1)

    return jax.tree.map(put_together, a, b, bye)


_Places = tuple[Int32[Array, " h"], Int32[Array, " h"]]


class _Exchange(NamedTuple):
    """How far apart a pair is after an exchange, and the one or two places on both sides."""

    apart: Int32[Array, " h"]
    from_a: _Places
    from_b: _Places


def _best_exchange(
    apart: Int32[Array, " h"],
    a: Int32[Array, "c h"],
    b: Int32[Array, "c h"],
    barred_a: Bool[Array, "c h"],
    barred_b: Bool[Array, "c h"],
    bundles: tuple[np.ndarray, ...],
) -> _Exchange:
    """The exchange of as many items as `bundles` has places that leaves least between a pair."""

    def weighed(x: Array, barred: Array) -> tuple[Array, Array]:
        weights = reduce(jnp.add, [2 * x[k] for k in bundles])
        return weights, reduce(jnp.logical_or, [barred[k] for k in bundles])

    moved, never = weighed(a, barred_a)
    left = jnp.where(never, _NEVER, apart - moved)
    moved, never = weighed(b, barred_b)
    right = jnp.where(never, _NEVER, moved)

    def against(i: Array | int, least: Array) -> Array:
        return jnp.minimum(least, jnp.abs(left + right[i]))

    count = right.shape[0]
    start = jnp.abs(left + right[0])
    least = lax.fori_loop(1, count, against, start, unroll=min(max(count - 1, 1), 4))
    after = jnp.min(least, axis=0)
    from_a = first_equal(least, after)
    from_b = first_equal(jnp.abs(pick(left, from_a) + right), after)
    places = [jnp.asarray(k, jnp.int32) for k in (bundles[0], bundles[-1])]
    return _Exchange(
        after,
        (take_rows(places[0], from_a), take_rows(places[1], from_a)),
        (take_rows(places[0], from_b), take_rows(places[1], from_b)),
    )


def _less_apart(one: _Exchange, other: _Exchange) -> _Exchange:
    return jax.tree.map(lambda x, y: jnp.where(other.apart < one.apart, y, x), one, other)


@dataclass(frozen=True)
class Peak(_Exchanges):
    """`steps` times: the exchange of the heaviest pack with any other that lightens it most.

    Closes the cases where the largest item bounds the heaviest pack and only the smallest items,
    which need not be in its partner of a round, bring it down. While there are repeats, three steps
    of four exchange one of them instead, for what adds the least load. O(c n) a step.
    """

    steps: int

    def improve(self, state: _State, key: Key[Array, ""], *, labelled: bool) -> _State:
        """Lighten the heaviest pack."""
        del key, labelled
        return lax.fori_loop(0, self.steps, _lighten, state)


def _lighten(i: Array | int, state: _State) -> _State:
    capacity, num_packs = state.value.shape
    loads = _loads(state.value)
    repeated = _repeats(state.label).ravel()
    number = jnp.cumsum(repeated, dtype=jnp.int32)
    step = jnp.asarray(i, jnp.int32)
    # Take turns, lest one repeat that cannot be removed holds up the others.
    turn = step % jnp.maximum(number[-1], 1) + 1
    urgent = (number[-1] > 0) & (step % 4 < 3)
    repeat = first_equal(jnp.where(repeated, number, 0), turn)
    pack = jnp.where(urgent, repeat % num_packs, first_equal(loads, jnp.max(loads)))
    value, label = state.value[:, pack], state.label[:, pack]

    moved = value[:, None, None] - state.value
    cost = jnp.maximum(loads[pack] - moved, loads + moved)
    same = label[:, None, None] == state.label
    barred = jnp.any(same, axis=1, keepdims=True) | jnp.any(same, axis=0, keepdims=True)
    place = jnp.arange(capacity, dtype=jnp.int32)
    barred |= (urgent & (place != repeat // num_packs))[:, None, None]
    never = jnp.iinfo(jnp.int32).max
    cost = jnp.where(barred, never, cost)
    by_other = jnp.min(cost, axis=0).ravel()
    least = jnp.min(by_other)
    other = first_equal(by_other, least)
    mine = first_equal(cost[:, other // num_packs, other % num_packs], least)
    good = least < jnp.where(urgent, never, loads[pack])

    slot = jnp.arange(capacity * num_packs, dtype=jnp.int32).reshape(capacity, num_packs)
    here, there = good & (slot == mine * num_packs + pack), good & (slot == other)

    def exchange(x: Int32[Array, "c m"]) -> Int32[Array, "c m"]:
        return jnp.where(here, x.ravel()[other], jnp.where(there, x[mine, pack], x))

    return jax.tree.map(exchange, state)


_MORE_ROUNDS = {3: 4, 4: 12, 5: 8, 6: 4, 7: 4, 8: 2}
"""A pair of small packs has few exchanges, which are quickly looked at and rarely fit."""


@dataclass(frozen=True)
class Portfolio(_Exchanges):
    """What each shape of packs gains most from.

    ======  ==================================================================================
    c       steps
    ======  ==================================================================================
    2       `rounds` of `Pairs`, one for one: for repeats only, as `differencing` is optimal
    3       `columns` of `Columns`; four times `rounds`, one for one, as two for two is one for
            one of the third items
    4       half of `columns`; twelve times `rounds`, two for two
    5       a quarter of `columns`; eight times `rounds`, two for two
    6 to 8  four, four and two times `rounds`, two for two
    9-16    `rounds`, two for two
    more    `rounds`, one for one
    ======  ==================================================================================

    and at the end `peaks` of `Peak`. With up to 5 items a pack and 128 in all the steps are taken
    2 to 4 times, with other blocks, and the best packing is kept.
    """

    columns: int
    rounds: int
    peaks: int

    def improve(self, state: _State, key: Key[Array, ""], *, labelled: bool) -> _State:
        """Take the steps of this shape."""
        capacity, num_packs = state.value.shape
        rounds = self.rounds * _MORE_ROUNDS.get(capacity, 1)
        parts: list[_Exchanges] = [Pairs(rounds, 4 <= capacity <= 16), Peak(self.peaks)]
        if 3 <= capacity <= 5:
            parts.insert(0, Columns(self.columns >> (capacity - 3)))

        def chain(key: Key[Array, ""]) -> _State:
            end = state
            for part in parts:
                end = part.improve(end, key, labelled=labelled)
            return end

        chains = min(256 // (capacity * num_packs), 4) if 3 <= capacity <= 5 else 1
        if chains < 2:
            return chain(key)
        ends = jax.vmap(chain)(jax.random.split(key, chains))
        repeats = jnp.sum(jax.vmap(_repeats)(ends.label), axis=(1, 2), dtype=jnp.int32)
        heaviest = jnp.max(jax.vmap(_loads)(ends.value), axis=1)
        chosen = best((repeats, heaviest), 1)[0]
        return jax.tree.map(lambda x: x[chosen], ends)
