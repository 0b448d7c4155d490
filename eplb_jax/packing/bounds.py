"""Lower bounds on the heaviest pack: how far from the optimum a packing can be at most.

With the weights falling, w_1 >= w_2 >= ..., P their prefix sums and S(k) the sum of the k
smallest, no packing into m packs of c items has a heaviest pack below

- L0 = P_n / m, the mean;
- L1 = w_1 + S(c - 1), the pack of the largest item;
- L2: of the first km + 1 items, some pack holds k + 1: those cannot weigh less than the lightest
  k + 1 of them, and what else the pack holds not less than S(c - k - 1);
- L3: of the first km + h items, some q <= h packs hold qk + h: their mean cannot be less than that
  of the lightest qk + h of them and S(q (c - k) - h). Which q is not known, so that the bound is
  the least over q. It covers L1 (k = 0, h = 1), L2 (h = 1) and L0 (k = 0, h = m).

With c = 2 the optimum itself is known, the heaviest of w_i + w_(2m + 1 - i): of the items 1..i two
share a pack, or one is with an item of rank 2m + 1 - i or before, as only i - 1 rank behind it.

References:
    M. Dell'Amico and S. Martello, "Bounds for the cardinality constrained P||Cmax problem",
    Journal of Scheduling 4, 2001, for L0 to L2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.packing.balanced_packing import check_size
from eplb_jax.sharding import by_layers


def packing_bound(weight: LoadLike, num_packs: int) -> Float[Array, " L"]:
    """A load that the heaviest pack of no packing stays below: max(L0, L1, L2, L3).

    Rounding in float32 can lift it by some parts in 10^6. O(n m) a layer.

    Args:
        weight: [L, n] weights in any unit; anything `jnp.asarray` takes.
        num_packs: How many packs; divides n.

    Returns:
        The bound of every layer, in the unit of the weights.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: num_packs does not divide n, `weight` is not [L, n], or a weight is NaN,
            infinite or negative.

    Example:
        >>> packing_bound([[5, 5, 5, 1, 1, 1]], 2).tolist()
        [11.0]
    """
    load = as_load(weight, "weight", ("layer", "item"), least_axes=2)
    num_packs = as_count("num_packs", num_packs)
    check_size(load.shape[1], num_packs)
    return _packing_bound(load, num_packs=num_packs)


@by_layers
@partial(jax.jit, static_argnames="num_packs")
def _packing_bound(weight: Float[Array, "L n"], *, num_packs: int) -> Float[Array, " L"]:
    return jax.vmap(lambda x: _bound_of_layer(x, num_packs))(weight)


def _bound_of_layer(weight: Float[Array, " n"], num_packs: int) -> Float[Array, ""]:
    n, m = weight.shape[0], num_packs
    capacity = n // m
    falling = -jnp.sort(-weight)
    if capacity == 2:
        return jnp.max(falling[:m] + falling[: m - 1 : -1])
    zero = jnp.zeros(1, weight.dtype)
    prefix = jnp.concatenate([zero, jnp.cumsum(falling)])  # P
    smallest = jnp.concatenate([zero, jnp.cumsum(falling[::-1])])  # S
    h = jnp.arange(1, m + 1, dtype=jnp.int32)[:, None]
    q = jnp.arange(1, m + 1, dtype=jnp.int32)

    def with_prefix(k: Array | int, best: Float[Array, ""]) -> Float[Array, ""]:
        first, inside = k * m + h, q * k + h
        possible = (q <= h) & (inside <= q * capacity)
        lightest = prefix[first] - prefix[jnp.maximum(first - inside, 0)]
        rest = smallest[jnp.maximum(q * capacity - inside, 0)]
        mean = jnp.where(possible, (lightest + rest) / q.astype(weight.dtype), jnp.inf)
        return jnp.maximum(best, jnp.max(jnp.min(mean, axis=1)))

    return lax.fori_loop(0, capacity, with_prefix, prefix[-1] / m)
