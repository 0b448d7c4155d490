"""What each shape of packs gains most from: blocks dealt out anew, pairs, the heaviest pack."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Key

from eplb_jax.packing.exchange import Exchanges, State, loads, repeats
from eplb_jax.packing.lanes import along, first_equal, least_row, ranks, take_rows, where_equal
from eplb_jax.packing.objective import best
from eplb_jax.packing.pairs import Pairs


@dataclass(frozen=True)
class Columns(Exchanges):
    """`steps` times: take a block of items out of every pack and deal the blocks out anew.

    A block is a stretch of h places from a random one on, h = 1 to c / 2 in turn. The heaviest
    block goes to the pack with the lightest rest: for given blocks no other assignment has a
    lighter heaviest pack or fewer squares. O(m^2 + n) a step; the best refinement for packs of
    three to five items. Labels are not looked at, nor windows but the first.
    """

    steps: int
    keeps_labels: ClassVar[bool] = False
    sees_windows: ClassVar[bool] = False

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Deal out blocks."""
        del labelled
        _, capacity, num_packs = state.value.shape
        offsets = jax.random.randint(key, (self.steps, num_packs), 0, capacity, jnp.int32)
        largest = max(capacity // 2, 1)
        place = jnp.arange(capacity, dtype=jnp.int32)[:, None]

        def dealt(i: Array | int, state: State, height: int) -> State:
            turned = (place + offsets[i * largest + height - 1]) % capacity
            turn = lambda x: along(x, turned, 0)  # noqa: E731
            value, item, label = turn(state.value[0]), turn(state.item), turn(state.label)
            block, rest = (jnp.sum(x, axis=0, dtype=jnp.int32) for x in jnp.split(value, [height]))
            taken = where_equal(ranks(rest), num_packs - 1 - ranks(block))
            deal = lambda x: jnp.concatenate([take_rows(x[:height].T, taken).T, x[height:]])  # noqa: E731
            return State(deal(value)[None], deal(item), deal(label))

        def step(i: Array | int, state: State) -> State:
            for height in range(1, largest + 1):
                state = dealt(i, state, height)
            return state

        return lax.fori_loop(0, self.steps // largest, step, state) if self.steps else state


@dataclass(frozen=True)
class Peak(Exchanges):
    """`steps` times: the exchange of the heaviest pack with any other that lightens it most.

    Closes the cases where the largest item bounds the heaviest pack and only the smallest items,
    which need not be in its partner of a round, bring it down. With several windows it is the
    heaviest pack of each in turn, and the heavier of both packs is added up over windows. While
    there are repeats, three steps of four exchange one of them instead, for what adds the least
    load. O(T c n) a step.
    """

    steps: int

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Lighten the heaviest pack."""
        del key, labelled
        start = _Lightened(state, jnp.asarray(-1, jnp.int32))
        return lax.fori_loop(0, self.steps, _lighten, start).state


class _Lightened(NamedTuple):
    """Carry of `Peak`: the packs, and the place of the last repeat that was looked at."""

    state: State
    last: Int32[Array, ""]


def _lighten(i: Array | int, carry: _Lightened) -> _Lightened:
    state, last = carry
    num_windows, capacity, num_packs = state.value.shape
    load = loads(state.value)
    n, step = capacity * num_packs, jnp.asarray(i, jnp.int32)
    slot = jnp.arange(n, dtype=jnp.int32).reshape(capacity, num_packs)
    # Repeats take turns, lest one that cannot be removed holds up the others.
    turn = jnp.where(repeats(state.label), (slot - last - 1) % n, n)
    turn = jnp.min(_least(turn)[0])
    repeat = (last + 1 + turn) % n
    urgent = (turn < n) & (step % 4 < 3)
    seen = load[step % num_windows]
    pack = jnp.where(urgent, repeat % num_packs, first_equal(seen, jnp.max(seen)))
    value, label = state.value[:, :, pack], state.label[:, pack]

    mine, others = load[:, pack, None], load
    moved = value[:, :, None, None] - state.value[:, None]
    heavier = jnp.maximum(mine[..., None, None] - moved, others[:, None, None] + moved)
    cost = reduce(jnp.add, heavier)
    before = jnp.sum(jnp.maximum(mine, others), axis=0, dtype=jnp.int32)
    same = label[:, None, None] == state.label
    barred = jnp.any(same, axis=1, keepdims=True) | jnp.any(same, axis=0, keepdims=True)
    place = jnp.arange(capacity, dtype=jnp.int32)
    barred |= (urgent & (place != repeat // num_packs))[:, None, None]
    cost, out = _least(jnp.where(barred, _NEVER, cost))
    cost, at, out = least_row(cost, out, jnp.full(num_packs, _NEVER))
    least = jnp.min(cost)
    other = first_equal(cost, least)
    good = least < jnp.where(urgent, _NEVER, before[other])

    mine_at, other_at = out[other], at[other]
    here = good & (slot == mine_at * num_packs + pack)
    there = good & (slot == other_at * num_packs + other)

    all_of = jnp.concatenate([state.value, state.item[None], state.label[None]])
    come, gone = all_of[:, other_at, other], all_of[:, mine_at, pack]
    after = jnp.where(here, come[:, None, None], jnp.where(there, gone[:, None, None], all_of))
    after = State(after[:num_windows], after[-2], after[-1])
    return _Lightened(after, jnp.where(urgent, repeat, last))


def _least(x: Int32[Array, "r *K"]) -> tuple[Int32[Array, "*K"], Int32[Array, "*K"]]:
    """The least of every lane, and where it is, if less than `_NEVER`."""
    return least_row(x, jnp.zeros_like(x), jnp.full(x.shape[1:], _NEVER))[:2]


_NEVER = np.int32(np.iinfo(np.int32).max)

_MORE_ROUNDS = {3: 4, 4: 12, 5: 8, 6: 4, 7: 4, 8: 2}
"""A pair of small packs has few exchanges, which are quickly looked at and rarely fit."""


@dataclass(frozen=True)
class Portfolio(Exchanges):
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

    With several windows: three times `rounds`, eight times with up to 128 items in all, one for
    one, and two for two with 4 or 5 items a pack.
    """

    columns: int
    rounds: int
    peaks: int
    kernel: Any = None
    """`kernels.InKernel`, to take the place of `Pairs` and `Peak`."""

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Take the steps of this shape."""
        num_windows, capacity, num_packs = state.value.shape
        columns = self.columns >> (capacity - 3) if 3 <= capacity <= 5 and num_windows == 1 else 0
        if num_windows > 1:
            rounds = self.rounds * (8 if capacity * num_packs <= 128 else 3)
            pairs = Pairs(rounds, 4 <= capacity <= 5)
        else:
            rounds = self.rounds * _MORE_ROUNDS.get(capacity, 1)
            pairs = Pairs(rounds, 4 <= capacity <= 16)
        parts: list[Exchanges] = [pairs, Peak(self.peaks)]
        if self.kernel is not None:
            parts = [replace(self.kernel, pairs=pairs, peak=Peak(self.peaks))]
        if columns:
            parts.insert(0, Columns(columns))

        def chain(key: Key[Array, ""]) -> State:
            end = state
            for part in parts:
                end = part.improve(end, key, labelled=labelled)
            return end

        chains = min(256 // (capacity * num_packs), 4) if columns else 1
        if chains < 2:
            return chain(key)
        ends = jax.vmap(chain)(jax.random.split(key, chains))
        repeated = jnp.sum(jax.vmap(repeats)(ends.label), axis=(1, 2), dtype=jnp.int32)
        heaviest = jnp.max(jax.vmap(loads)(ends.value), axis=2)
        chosen = best((repeated, jnp.sum(heaviest, axis=1, dtype=jnp.int32)), 1)[0]
        return jax.tree.map(lambda x: x[chosen], ends)
