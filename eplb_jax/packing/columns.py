"""Blocks of items taken out of every pack and dealt out anew."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from eplb_jax.arrays import along, positions_of, ranks, take_rows
from eplb_jax.packing.exchange import Exchanges, State


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
            taken = positions_of(ranks(rest), num_packs - 1 - ranks(block))
            deal = lambda x: jnp.concatenate([take_rows(x[:height].T, taken).T, x[height:]])  # noqa: E731
            return State(deal(value)[None], deal(item), deal(label))

        def step(i: Array | int, state: State) -> State:
            for height in range(1, largest + 1):
                state = dealt(i, state, height)
            return state

        return lax.fori_loop(0, self.steps // largest, step, state) if self.steps else state
