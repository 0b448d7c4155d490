"""Ruin and recreate: a few packs packed anew."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import LOAD_BITS, first_equal, fixed_point, loads_of, rows
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.objectives import best, better, peak
from eplb_jax.packing.orders import NoisyLpt
from eplb_jax.packing.sorting import descending_order


@dataclass(frozen=True)
class Rebuild:
    """`steps` times ruin and recreate: pool the items of the heaviest and the lightest pack.

    The pool is packed anew `attempts` times by greedy, first in LPT order, then with sort keys
    multiplied by U[low, high]; the best attempt by (heaviest, sum of squares) of these packs
    replaces them if it is better. With `third`, the first half of the steps pools a random
    third pack too: that moves more while loads are coarse, and leaves the finer exchanges of
    two packs for the end.

    References:
        G. Schrimpf et al., "Record breaking optimization results using the ruin and recreate
        principle", Journal of Computational Physics 159, 2000.
    """

    steps: int
    attempts: int = 1
    low: float = 1.0
    high: float = 1.0
    third: bool = False
    keeps_labels: ClassVar[bool] = False
    sees_windows: ClassVar[bool] = False

    def __call__(
        self,
        contents: Int32[Array, "m c *K"],
        weight: Float[Array, "..."],
        key: Key[Array, ""],
        label: Int32[Array, "..."] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        del label
        if contents.ndim > 2:
            axes = -1, None if weight.ndim == 1 else -1, None
            return jax.vmap(self, axes, -1)(contents, weight, key)
        num_packs, capacity = contents.shape
        third = self.third and num_packs > 2
        units = fixed_point(weight, capacity, LOAD_BITS)
        third_key, noise_key = jax.random.split(key)
        skips = jax.random.randint(third_key, (self.steps,), 0, max(num_packs - 2, 1), jnp.int32)
        factors = NoisyLpt(self.steps * (self.attempts - 1), self.low, self.high)
        noise = factors.draw(noise_key, (3 if third else 2) * capacity)
        noise = noise.reshape(noise.shape[0], self.steps, self.attempts - 1)

        def three(i: Array | int, contents: Int32[Array, "m c"]) -> Int32[Array, "m c"]:
            return _rebuilt(contents, weight, units, noise[:, i], skips[i])

        def two(i: Array | int, contents: Int32[Array, "m c"]) -> Int32[Array, "m c"]:
            return _rebuilt(contents, weight, units, noise[: 2 * capacity, i])

        if not third:
            return lax.fori_loop(0, self.steps, two, contents)
        contents = lax.fori_loop(0, self.steps // 2, three, contents)
        return lax.fori_loop(self.steps // 2, self.steps, two, contents)


def _rebuilt(
    contents: Int32[Array, "m c"],
    weight: Float[Array, " n"],
    units: Int32[Array, " n"],
    noise: Float[Array, "p K"],
    skip: Int32[Array, ""] | None = None,
) -> Int32[Array, "m c"]:
    """`contents` with its heaviest and lightest pack rebuilt, if that is better.

    `units` are the weights in fixed point; `noise`, the factors of the sort keys of the p pooled
    items in every attempt but the first. `skip` pools one more pack, the one with that number
    among the others.
    """
    loads = loads_of(units, contents)
    heaviest = first_equal(loads, jnp.max(loads))
    others = jnp.where(rows(loads.shape[0], loads) == heaviest, jnp.iinfo(jnp.int32).max, loads)
    packs = [heaviest, first_equal(others, jnp.min(others))]
    if skip is not None:
        for taken in (jnp.minimum(*packs), jnp.maximum(*packs)):
            skip = skip + (skip >= taken).astype(jnp.int32)
        packs.append(skip)
    pooled = jnp.stack(packs)

    items = lax.sort(contents[pooled].ravel())
    pool = weight[items]
    orders = rows(items.shape[0], noise)
    if noise.shape[1]:
        orders = jnp.concatenate([orders, descending_order(noise * pool[:, None])], axis=1)
    attempts = quantised_greedy(pool, orders, len(packs)).contents
    scores = peak(loads_of(units[items], attempts))
    chosen = best(scores, 1)[0]
    improves = better(tuple(s[chosen] for s in scores), peak(loads[pooled]))
    rebuilt = items[attempts[..., chosen]]
    return contents.at[pooled].set(jnp.where(improves, rebuilt, contents[pooled]))
