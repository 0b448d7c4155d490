"""The greedy in one kernel."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from eplb_jax.arrays import look_up
from eplb_jax.packing.constructions import Constructed, PackedState, contents_of, packed_state
from eplb_jax.packing.items import Items
from eplb_jax.packing.kernels.layer import MOST, Ref, along_axis, call_of, loop


@dataclass(frozen=True)
class GreedyInKernel:
    """`quantised_greedy`, a construction, in one kernel for all lanes, bit for bit.

    A lane is one warp that holds the packs in its registers. See `InKernel` for platforms.
    """

    interpret: bool = False

    def __call__(self, items: Items, order: Int32[Array, "n *K"], num_packs: int) -> Constructed:
        """Place the items of every lane in its order."""
        n, *lanes = order.shape
        state_of = packed_state(n, num_packs)
        steps = look_up(state_of.steps(items.units), order)
        sizes = [n, pl.next_power_of_2(num_packs)]
        kernel = partial(_greedy, n, num_packs, state_of)
        call = call_of(kernel, sizes, self.interpret, warps=1)
        pack_index, state = jax.vmap(call, out_axes=-1)(steps.reshape(n, -1).T)
        contents = contents_of(pack_index.reshape(n, *lanes), order, num_packs)
        return Constructed(contents, state_of.loads(state[:num_packs]).reshape(num_packs, *lanes))


def _greedy(
    n: int, num_packs: int, state_of: PackedState, steps: Ref, pack_index: Ref, state: Ref
) -> None:
    """The kernel: see `quantised_greedy`."""
    pack = along_axis(1, pl.next_power_of_2(num_packs))[0]

    def place(i: Array, state: Array) -> Array:
        least = jnp.min(state)
        after, pack_index[i] = state_of.add(least, steps[i])
        return jnp.where(state == least, after, state)

    # Padding never has the least load.
    state[pack] = loop(n, place, jnp.where(pack < num_packs, state_of.empty(pack), MOST))
