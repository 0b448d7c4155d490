"""Blocks of items, taken out of every pack and assigned anew."""

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
    """`steps` times: take a block of items out of every pack and assign the blocks anew.

    A block is h consecutive positions from a random one on, h = 1 to c / 2 in turn. The block with
    the largest load goes to the pack with the least rest: for given blocks no other assignment has
    a lower maximum load or sum of squares. O(m^2 + n) a step; the best refinement for packs of
    three to five items. Labels and windows are ignored.
    """

    steps: int
    keeps_labels: ClassVar[bool] = False
    uses_windows: ClassVar[bool] = False

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Assign blocks anew."""
        del labelled
        _, capacity, num_packs = state.value.shape
        offsets = jax.random.randint(key, (self.steps, num_packs), 0, capacity, jnp.int32)
        largest = max(capacity // 2, 1)
        position = jnp.arange(capacity, dtype=jnp.int32)[:, None]

        def assign_blocks(i: Array | int, state: State, height: int) -> State:
            turned = (position + offsets[i * largest + height - 1][None]) % capacity
            value, item, label = (along(x, turned, 0) for x in state._replace(value=state.value[0]))
            block, rest = (jnp.sum(x, axis=0, dtype=jnp.int32) for x in jnp.split(value, [height]))
            block_of = positions_of(ranks(rest), num_packs - 1 - ranks(block))

            def assign(x: Array) -> Array:
                return jnp.concatenate([take_rows(x[:height].T, block_of).T, x[height:]])

            return State(assign(value)[None], assign(item), assign(label))

        def step(i: Array | int, state: State) -> State:
            for height in range(1, largest + 1):
                state = assign_blocks(i, state, height)
            return state

        return lax.fori_loop(0, self.steps // largest, step, state) if self.steps else state
