"""What each shape of packs gains most from: blocks dealt out anew, pairs, the heaviest pack."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from eplb_jax.packing.columns import Columns
from eplb_jax.packing.exchange import Exchanges, State, loads, repeats
from eplb_jax.packing.objectives import best
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak

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

    def exchanges(self, pairs: Pairs, peak: Peak) -> list[Exchanges]:
        """What takes these steps, one after the other."""
        return [pairs, peak]

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
        repeated = jnp.sum(jax.vmap(repeats)(ends.label), axis=(1, 2), dtype=jnp.int32)
        heaviest = jnp.max(jax.vmap(loads)(ends.value), axis=2)
        chosen = best((repeated, jnp.sum(heaviest, axis=1, dtype=jnp.int32)), 1)[0]
        return jax.tree.map(lambda x: x[chosen], ends)
