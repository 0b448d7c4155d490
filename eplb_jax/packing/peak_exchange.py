"""The best exchange between the most loaded pack and any other."""

from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Key

from eplb_jax.arrays import first_equal, least_row
from eplb_jax.packing.exchange import (
    Exchanges,
    State,
    count_windows,
    is_duplicate,
    pack_loads,
)


@dataclass(frozen=True)
class Peak(Exchanges):
    """`steps` times: the exchange that lowers the most loaded pack most, with any other pack.

    For instances where the largest item bounds the maximum load and only the smallest items, which
    need not be in its partner of a round, lower it. With several windows it is the most loaded pack
    of each in turn, and the larger load of both packs is summed over windows. While there are
    duplicates, three steps of four exchange one of them instead, for the least added load.
    O(T c n) a step.
    """

    steps: int

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Lower the most loaded pack."""
        del key, labelled
        start = _Lowered(state, jnp.asarray(-1, jnp.int32))
        lower = partial(_lower, count=count_windows(state.value))
        return lax.fori_loop(0, self.steps, lower, start).state


class _Lowered(NamedTuple):
    """Carry of `Peak`: the packs, and the position of the last duplicate that was tried."""

    state: State
    last: Int32[Array, ""]


_NEVER = np.int32(np.iinfo(np.int32).max)


def _lower(i: Array | int, carry: _Lowered, *, count: Int32[Array, ""]) -> _Lowered:
    state, last = carry
    num_windows, capacity, num_packs = state.value.shape
    load = pack_loads(state.value)
    n, step = capacity * num_packs, jnp.asarray(i, jnp.int32)
    slot = jnp.arange(n, dtype=jnp.int32).reshape(capacity, num_packs)
    # Duplicates take turns, so one that cannot be removed does not hold up the others.
    turn = jnp.where(is_duplicate(state.label), (slot - last - 1) % n, n)
    turn = jnp.min(_least(turn)[0])
    duplicate = (last + 1 + turn) % n
    urgent = (turn < n) & (step % 4 < 3)
    visible = load[step % count]
    pack = jnp.where(urgent, duplicate % num_packs, first_equal(visible, jnp.max(visible)))
    value, label = state.value[:, :, pack], state.label[:, pack]

    mine, others = load[:, pack, None], load
    moved = value[:, :, None, None] - state.value[:, None]
    larger = jnp.maximum(mine[..., None, None] - moved, others[:, None, None] + moved)
    cost = reduce(jnp.add, larger)
    before = jnp.sum(jnp.maximum(mine, others), axis=0, dtype=jnp.int32)
    same = label[:, None, None] == state.label[None]
    invalid = jnp.any(same, axis=1, keepdims=True) | jnp.any(same, axis=0, keepdims=True)
    position = jnp.arange(capacity, dtype=jnp.int32)
    invalid |= (urgent & (position != duplicate // num_packs))[:, None, None]
    cost, out = _least(jnp.where(invalid, _NEVER, cost))
    cost, at, out = least_row(cost, out, jnp.full(num_packs, _NEVER))
    least = jnp.min(cost)
    other = first_equal(cost, least)
    good = least < jnp.where(urgent, _NEVER, before[other])

    mine_at, other_at = out[other], at[other]
    here = good & (slot == mine_at * num_packs + pack)
    there = good & (slot == other_at * num_packs + other)

    all_of = jnp.concatenate([state.value, state.item[None], state.label[None]])
    into, out_of = all_of[:, other_at, other], all_of[:, mine_at, pack]
    after = jnp.where(here, into[:, None, None], jnp.where(there, out_of[:, None, None], all_of))
    after = State(after[:num_windows], after[-2], after[-1])
    return _Lowered(after, jnp.where(urgent, duplicate, last))


def _least(x: Int32[Array, "r *K"]) -> tuple[Int32[Array, "*K"], Int32[Array, "*K"]]:
    """The minimum of every lane and its row, if below `_NEVER`."""
    return least_row(x, jnp.zeros_like(x), jnp.full(x.shape[1:], _NEVER))[:2]
