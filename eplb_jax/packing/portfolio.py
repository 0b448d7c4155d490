"""Which exchanges each shape of packs gains most from."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from eplb_jax.packing.columns import Columns
from eplb_jax.packing.exchange import Exchanges, State, is_duplicate, pack_loads
from eplb_jax.packing.objectives import best
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak

_MORE_ROUNDS = {3: 4, 4: 12, 5: 8, 6: 4, 7: 4, 8: 2}
"""Factor of `rounds` by items per pack: two small packs have few exchanges, which rarely help."""


@dataclass(frozen=True)
class Portfolio(Exchanges):
    """The exchanges that each shape of packs gains most from.

    ======  ==================================================================================
    c       steps
    ======  ==================================================================================
    2       `rounds` of `Pairs` with 1-swaps: for duplicates only, as `differencing` is optimal
    3       `columns` of `Columns`; 4 x `rounds` with 1-swaps (a 2-swap is a 1-swap of the third)
    4       half of `columns`; 12 x `rounds` with 2-swaps
    5       a quarter of `columns`; 8 x `rounds` with 2-swaps
    6 to 8  4, 4 and 2 x `rounds` with 2-swaps
    9-16    `rounds` with 2-swaps
    more    `rounds` with 1-swaps
    ======  ==================================================================================

    and at the end `peaks` of `Peak`. With up to 5 items a pack and 128 in total, the steps are
    taken from 2 to 4 random keys, and the best packing is kept.

    With several windows: 3 x `rounds`, with up to 128 items in total m / 2 x, 8 x at most; with
    1-swaps, and with 2-swaps for 4 or 5 items a pack.
    """

    columns: int
    rounds: int
    peaks: int

    def exchanges(self, pairs: Pairs, peak: Peak) -> list[Exchanges]:
        """What takes these steps, one after the other."""
        return [pairs, peak]

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Take the steps of this shape."""
        num_windows, capacity, num_packs = state.value.shape
        columns = self.columns >> (capacity - 3) if 3 <= capacity <= 5 and num_windows == 1 else 0
        if num_windows > 1:
            few = capacity * num_packs <= 128
            rounds = self.rounds * (min(max(num_packs // 2, 3), 8) if few else 3)
            pairs = Pairs(rounds, 4 <= capacity <= 5)
        else:
            rounds = self.rounds * _MORE_ROUNDS.get(capacity, 1)
            pairs = Pairs(rounds, 4 <= capacity <= 16)
        parts = self.exchanges(pairs, Peak(self.peaks))
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
        duplicates = jnp.sum(jax.vmap(is_duplicate)(ends.label), axis=(1, 2), dtype=jnp.int32)
        largest = jnp.max(jax.vmap(pack_loads)(ends.value), axis=2)
        chosen = best((duplicates, jnp.sum(largest, axis=1, dtype=jnp.int32)), 1)[0]
        return jax.tree.map(lambda x: x[chosen], ends)
