"""All exchanges of a layer in one kernel."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Key

from eplb_jax.packing.exchange import Exchanges, State, columns, count_windows
from eplb_jax.packing.kernels.layer import AT_ONCE, Layer, Ref, Sizes, along_axis, call_of, loop
from eplb_jax.packing.pair_exchange import Pairs, bundles_of, schedule
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio


@dataclass(frozen=True)
class InKernel(Exchanges):
    """`pairs` and then `peak`, in one kernel for all layers and candidates.

    Finds the packings of ``pairs`` followed by ``peak`` bit for bit, for any number of packs,
    places and windows, with labels and without. `in_kernels` makes a strategy with it.

    Only for CUDA, by Pallas and Triton. On other platforms lowering raises a ValueError;
    ``interpret=True`` runs everywhere, and is for tests.

    Not yet run on a GPU, so there are no timings. A layer is a block of 128 threads. For 288
    items in 32 packs Triton 3.9 and ptxas (sm_90) take 2 KiB of shared memory and 96 registers a
    thread, 125 with four windows, and spill none; scratch are 8 KiB of global memory. All 255
    registers are in use at 256 packs of 16, 8,192 places with what is padded; more will spill.

    With several windows squares from 2 ** 24 on are rounded, and otherwise where a compiler fuses
    multiplications with additions: on a GPU that may tip a tie, as it may in the plain form.
    """

    pairs: Pairs
    peak: Peak
    interpret: bool = False

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Exchange in all pairs, then lighten the most loaded pack."""
        del key
        windows, capacity, packs = state.value.shape
        if packs < 2:
            return state
        bundles = bundles_of(capacity, two=self.pairs.two)
        count, up = len(bundles[0]), pl.next_power_of_2
        pairs = min(max(AT_ONCE // (up(count) * up(windows)), 1), up(packs // 2))
        s = Sizes(windows, capacity, packs, count, up(capacity), up(packs), up(count), pairs)
        first, last = (np.pad(bundles[k], (0, s.rows - count)) for k in (0, -1))
        to = np.tile(np.arange(s.columns, dtype=np.int32), (max(self.pairs.rounds, 1), 1))
        to[: self.pairs.rounds, :packs] = np.argsort(schedule(packs, self.pairs.rounds), axis=1)

        scratch = s.windows * s.rows * pairs, 2 * s.positions * pairs, s.columns
        kernel = partial(_all_steps, s, self, labelled)
        call = call_of(kernel, [s.positions * s.columns, *scratch], self.interpret, warps=4)
        given = state.value.ravel(), state.label.ravel(), to.ravel(), first, last
        given += (count_windows(state.value)[None],)
        position = call(*map(jnp.asarray, given))[0].reshape(s.positions, s.columns)
        flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        return State(*(columns(x, position[:capacity, :packs]) for x in flat))


@dataclass(frozen=True)
class PortfolioInKernel(Portfolio):
    """`Portfolio` with its exchanges in one kernel."""

    interpret: bool = False

    def exchanges(self, pairs: Pairs, peak: Peak) -> list[Exchanges]:
        """What takes these steps, one after the other."""
        return [InKernel(pairs, peak, self.interpret)]


def _all_steps(sizes: Sizes, steps: InKernel, labelled: bool, *refs: Ref) -> None:
    """The kernel."""
    layer = Layer(sizes, labelled, steps.interpret, *refs)
    position, pack = along_axis(0, sizes.positions), along_axis(1, sizes.columns)
    real = (position < sizes.capacity) & (pack < sizes.packs)
    layer.put(position, pack, jnp.where(real, position * sizes.packs + pack, 0))

    def round_of(i: Array, _: None) -> None:
        layer.rank(i)
        loop(pl.cdiv(sizes.packs // 2, sizes.pairs), lambda k, _: layer.exchange(k), None)

    loop(steps.pairs.rounds, round_of, None)
    loop(steps.peak.steps, layer.lower, jnp.int32(-1))
