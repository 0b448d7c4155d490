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

from eplb_jax.packing.lanes import falling, first_equal, fixed_point, take_rows, unfused

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

    def columns(self, index: Int32[Array, " k"]) -> "State":
        """Some packs, in this order."""

        def chosen(x: Array) -> Array:
            return jnp.moveaxis(take_rows(jnp.moveaxis(x, -1, 0), index), 0, -1)

        return jax.tree.map(chosen, self)


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
        weight: Float[Array, "*T n"],
        key: Key[Array, ""],
        label: Int32[Array, " n"] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        if contents.ndim > 2:
            return jax.vmap(self, (-1, None, None, None), -1)(contents, weight, key, label)
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
        num_windows, _, num_packs = state.value.shape
        table = jnp.asarray(schedule(num_packs, self.rounds))

        def round_of(i: Array | int, state: State) -> State:
            by_window = loads(state.value)
            turn = jnp.asarray(i, jnp.int32) // 2 % num_windows
            over_all = jnp.sum(by_window, axis=0, dtype=jnp.int32)
            load = jnp.where(jnp.asarray(i, jnp.int32) % 2 == 0, over_all, by_window[turn])
            state = state.columns(take_rows(falling(load), table[i]))
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


def _exchanged(state: State, two: bool, labelled: bool) -> State:
    """The best exchange in every pair: of pack i with pack h + i, h = m // 2."""
    _, capacity, num_packs = state.value.shape
    half = num_packs // 2
    a, b, bye = (
        jax.tree.map(lambda x, at=at: x[..., at], state)
        for at in (slice(half), slice(half, 2 * half), slice(2 * half, None))
    )
    apart = loads(a.value) - loads(b.value)
    limit = _length(apart)
    barred_a = barred_b = jnp.zeros(a.item.shape, bool)
    if labelled:
        same = a.label[:, None] == b.label
        known_a, known_b = jnp.any(same, axis=1), jnp.any(same, axis=0)
        urgent = repeats(a.label) & ~known_a, repeats(b.label) & ~known_b
        urgent_a = jnp.any(urgent[0], axis=0)
        urgent_b = jnp.any(urgent[1], axis=0) & ~urgent_a
        barred_a = known_a | (urgent_a & ~urgent[0])
        barred_b = known_b | (urgent_b & ~urgent[1])
        limit = jnp.where(urgent_a | urgent_b, _length(jnp.full_like(apart, _ANYTHING)), limit)

    place = np.arange(capacity)
    bundles: list[tuple[np.ndarray, ...]] = [(place,)]
    if two and capacity > 3:
        bundles.append(np.triu_indices(capacity, k=1))
    options = [_best_exchange(apart, a.value, b.value, barred_a, barred_b, x) for x in bundles]
    chosen = reduce(_less_apart, options)

    good, row = chosen.apart < limit, place.astype(np.int32)[:, None]

    def put(x: Array, places: _Places, there: Array, others: _Places) -> Array:
        for at, other in zip(places, others, strict=True):
            x = jnp.where(good & (row == at), _at_places(there, other), x)
        return x

    def put_together(a: Array, b: Array, bye: Array) -> Array:
        new_a = put(a, chosen.from_a, b, chosen.from_b)
        new_b = put(b, chosen.from_b, a, chosen.from_a)
        return jnp.concatenate([new_a, new_b, bye], axis=-1)

    return jax.tree.map(put_together, a, b, bye)


_Places = tuple[Int32[Array, " h"], Int32[Array, " h"]]


class _Exchange(NamedTuple):
    """How far apart a pair is after an exchange, and the one or two places on both sides."""

    apart: Num[Array, " h"]
    from_a: _Places
    from_b: _Places


def _length(apart: Num[Array, "T *h"]) -> Num[Array, "*h"]:
    """How far apart packs are: their difference, or its squares added up over windows."""
    if apart.shape[0] == 1:
        return jnp.abs(apart[0])
    return reduce(jnp.add, [jnp.square(x.astype(jnp.float32)) for x in apart])


def _at_places(x: Num[Array, "*T c h"], place: Int32[Array, " h"]) -> Num[Array, "*T 1 h"]:
    """What every pack holds at its place."""
    place = jnp.broadcast_to(place, (*x.shape[:-2], 1, x.shape[-1]))
    return jnp.take_along_axis(x, place, axis=-2, mode="promise_in_bounds")


def _best_exchange(
    apart: Int32[Array, "T h"],
    a: Int32[Array, "T c h"],
    b: Int32[Array, "T c h"],
    barred_a: Bool[Array, "c h"],
    barred_b: Bool[Array, "c h"],
    bundles: tuple[np.ndarray, ...],
) -> _Exchange:
    """The exchange of as many items as `bundles` has places that leaves least between a pair."""

    def weighed(x: Array, barred: Array) -> tuple[Array, Array]:
        weights = reduce(jnp.add, [2 * x[:, k] for k in bundles])
        return weights, reduce(jnp.logical_or, [barred[k] for k in bundles])

    moved, never = weighed(a, barred_a)
    left = jnp.where(never, _NEVER, apart[:, None] - moved)
    moved, never = weighed(b, barred_b)
    right = jnp.where(never, _NEVER, moved)
    if len(apart) > 1:  # once, not in every comparison
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)

    def against(i: Array | int, least: Array) -> Array:
        return jnp.minimum(least, _length(left + right[:, i, None]))

    count = right.shape[1]
    start = _length(left + right[:, 0, None])
    least = lax.fori_loop(1, count, against, start, unroll=min(max(count - 1, 1), 4))
    after = jnp.min(least, axis=0)
    from_a = first_equal(least, after)
    left_after = unfused(_length(_at_places(left, from_a) + right))
    from_b = first_equal(left_after, jnp.min(left_after, axis=0))
    places = [jnp.asarray(k, jnp.int32) for k in (bundles[0], bundles[-1])]
    return _Exchange(
        after,
        (take_rows(places[0], from_a), take_rows(places[1], from_a)),
        (take_rows(places[0], from_b), take_rows(places[1], from_b)),
    )


def _less_apart(one: _Exchange, other: _Exchange) -> _Exchange:
    return jax.tree.map(lambda x, y: jnp.where(other.apart < one.apart, y, x), one, other)
