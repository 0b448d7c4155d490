"""The best exchange between the most loaded pack and any other."""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Key

from eplb_jax.arrays import first_equal, least_row
from eplb_jax.packing.exchange import Exchanges, State, loads, repeats


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
