"""The greedy in one kernel."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import fixed_point, index_bits, look_up
from eplb_jax.packing.constructions import Constructed, contents_of
from eplb_jax.packing.kernels.layer import MOST, Ref, along_axis, call_of, loop

_FULL = 1 << 30


@dataclass(frozen=True)
class GreedyInKernel:
    """`quantised_greedy`, a construction, in one kernel for all lanes, bit for bit.

    A lane is one warp that holds the packs in its registers. See `InKernel` for platforms.
    """

    interpret: bool = False

    def __call__(
        self, weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
    ) -> Constructed:
        """Place the items of every lane in its order."""
        n, *lanes = order.shape
        low = index_bits(n // num_packs + 1) + index_bits(num_packs)
        steps = look_up((fixed_point(weight, n // num_packs, 30 - low) << low) + 1, order)
        sizes = [n, pl.next_power_of_2(num_packs)]
        call = call_of(partial(_greedy, n, num_packs), sizes, self.interpret, warps=1)
        pack_index, state = jax.vmap(call, out_axes=-1)(steps.reshape(n, -1).T)
        loads = (state[:num_packs] & (_FULL - 1)) >> low
        pack_index = pack_index.reshape(n, *lanes)
        contents = contents_of(pack_index, order, num_packs)
        return Constructed(contents, loads.reshape(num_packs, *lanes))


def _greedy(n: int, num_packs: int, steps: Ref, pack_index: Ref, state: Ref) -> None:
    """The kernel: see `quantised_greedy` for what a state is."""
    item_bits, pack_bits = index_bits(n // num_packs + 1), index_bits(num_packs)
    pack = along_axis(1, pl.next_power_of_2(num_packs))[0]

    def place(i: Array, state: Array) -> Array:
        lightest = jnp.min(state)
        after = lightest + steps[i]
        full = (after & ((1 << item_bits) - 1)) == n // num_packs
        pack_index[i] = (lightest >> item_bits) & ((1 << pack_bits) - 1)
        return jnp.where(state == lightest, jnp.where(full, after | _FULL, after), state)

    # What is padded is never the lightest.
    state[pack] = loop(n, place, jnp.where(pack < num_packs, pack << item_bits, MOST))
