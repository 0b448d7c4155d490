"""Lower bounds on the maximum pack load: how far from the optimum a packing can be at most.

Let the weights be in descending order, w_1 >= w_2 >= ..., P their prefix sums and S(k) the sum of
the k smallest. The maximum load of any packing into m packs of c items is at least

- L0 = P_n / m, the mean;
- L1 = w_1 + S(c - 1), the pack of the largest item;
- L2: of the first km + 1 items, some pack holds k + 1: those weigh at least as much as the
  smallest k + 1 of them, and the rest of that pack at least S(c - k - 1);
- L3: of the first km + h items, some q <= h packs hold qk + h: their mean is at least that of the
  smallest qk + h of them and S(q (c - k) - h). As q is not known, the bound is the minimum over
  q. It covers L1 (k = 0, h = 1), L2 (h = 1) and L0 (k = 0, h = m).

With c = 2 the optimum itself is known, the maximum of w_i + w_(2m + 1 - i): among the items 1..i
two share a pack, or one is with an item of rank 2m + 1 - i or before, as only i - 1 ranks come
after it.

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
    """A lower bound on the maximum pack load of any packing: max(L0, L1, L2, L3).

    Rounding in float32 can raise it by about 1e-6. O(n m) a layer.

    Args:
        weight: [L, n] weights in any unit; anything `jnp.asarray` takes.
        num_packs: m; divides n.

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
    return jax.vmap(lambda x: bound_of_layer(x, num_packs))(weight)


def bound_of_layer(weight: Float[Array, " n"], num_packs: int) -> Float[Array, ""]:
    """`packing_bound` of one layer."""
    n, m = weight.shape[0], num_packs
    capacity = n // m
    descending = -jnp.sort(-weight)
    if capacity == 2:
        return jnp.max(descending[:m] + descending[: m - 1 : -1])
    zero = jnp.zeros(1, weight.dtype)
    prefix = jnp.concatenate([zero, jnp.cumsum(descending)])  # P
    smallest = jnp.concatenate([zero, jnp.cumsum(descending[::-1])])  # S
    h = jnp.arange(1, m + 1, dtype=jnp.int32)[:, None]
    q = jnp.arange(1, m + 1, dtype=jnp.int32)[None]

    def with_prefix(k: Array | int, best: Float[Array, ""]) -> Float[Array, ""]:
        first, inside = k * m + h, q * k + h
        possible = (q <= h) & (inside <= q * capacity)
        at_least = prefix[first] - prefix[jnp.maximum(first - inside, 0)]
        rest = smallest[jnp.maximum(q * capacity - inside, 0)]
        mean = jnp.where(possible, (at_least + rest) / q.astype(weight.dtype), jnp.inf)
        return jnp.maximum(best, jnp.max(jnp.min(mean, axis=1)))

    return lax.fori_loop(0, capacity, with_prefix, prefix[-1] / m)
