"""Ruin and recreate: a few packs packed anew."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import first_equal, loads_of, rows
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.items import Items
from eplb_jax.packing.objectives import best, better, peak
from eplb_jax.packing.orders import NoisyLpt
from eplb_jax.packing.refinement import Refinement
from eplb_jax.packing.sorting import descending_order


@dataclass(frozen=True)
class Rebuild(Refinement):
    """`steps` times ruin and recreate: pool the items of the most and the least loaded pack.

    The pool is packed anew `attempts` times by greedy, first in LPT order, then with sort keys
    multiplied by U[low, high]; the best attempt by (maximum load, sum of squares) of these packs
    replaces them if it is better. With `third`, the first half of the steps pools a random
    third pack too: large changes first, fine exchanges of two packs at the end.

    References:
        G. Schrimpf et al., "Record breaking optimization results using the ruin and recreate
        principle", Journal of Computational Physics 159, 2000.
    """

    steps: int
    attempts: int = 1
    low: float = 1.0
    high: float = 1.0
    third: bool = False

    def refine(
        self, contents: Int32[Array, "m c"], items: Items, key: Key[Array, ""]
    ) -> Int32[Array, "m c"]:
        """Refine one packing."""
        num_packs, capacity = contents.shape
        third = self.third and num_packs > 2
        third_key, noise_key = jax.random.split(key)
        skips = jax.random.randint(third_key, (self.steps,), 0, max(num_packs - 2, 1), jnp.int32)
        factors = NoisyLpt(self.steps * (self.attempts - 1), self.low, self.high)
        noise = factors.draw(noise_key, (3 if third else 2) * capacity)
        noise = noise.reshape(noise.shape[0], self.steps, self.attempts - 1)

        def three(i: Array | int, contents: Int32[Array, "m c"]) -> Int32[Array, "m c"]:
            return _rebuild(contents, items, noise[:, i], skips[i])

        def two(i: Array | int, contents: Int32[Array, "m c"]) -> Int32[Array, "m c"]:
            return _rebuild(contents, items, noise[: 2 * capacity, i])

        if not third:
            return lax.fori_loop(0, self.steps, two, contents)
        contents = lax.fori_loop(0, self.steps // 2, three, contents)
        return lax.fori_loop(self.steps // 2, self.steps, two, contents)


def _rebuild(
    contents: Int32[Array, "m c"],
    items: Items,
    noise: Float[Array, "p K"],
    skip: Int32[Array, ""] | None = None,
) -> Int32[Array, "m c"]:
    """`contents` with its most and least loaded packs rebuilt, if that is better.

    `noise` are the factors of the sort keys of the p pooled items in every attempt but the first.
    `skip` pools one more pack, the one with that number among the others.
    """
    loads = loads_of(items.units, contents)
    most = first_equal(loads, jnp.max(loads))
    others = jnp.where(rows(loads.shape[0], loads) == most, jnp.iinfo(jnp.int32).max, loads)
    packs = [most, first_equal(others, jnp.min(others))]
    if skip is not None:
        for taken in (jnp.minimum(*packs), jnp.maximum(*packs)):
            skip = skip + (skip >= taken).astype(jnp.int32)
        packs.append(skip)
    pooled = jnp.stack(packs)

    members = lax.sort(contents[pooled].ravel())
    pool = items.take(members)
    orders = rows(members.shape[0], noise)
    if noise.shape[1]:
        orders = jnp.concatenate([orders, descending_order(noise * pool.weight[:, None])], axis=1)
    attempts = quantised_greedy(pool, orders, len(packs)).contents
    scores = peak(loads_of(pool.units, attempts))
    chosen = best(scores, 1)[0]
    improves = better(tuple(s[chosen] for s in scores), peak(loads[pooled]))
    rebuilt = members[attempts[..., chosen]]
    return contents.at[pooled].set(jnp.where(improves, rebuilt, contents[pooled]))
