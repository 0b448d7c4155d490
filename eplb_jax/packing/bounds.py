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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.packing.balanced import check_size
from eplb_jax.replication import replicate
from eplb_jax.sharding import by_layers
from eplb_jax.validation import LoadLike, as_count, as_load, check_multiple


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
    load = as_load(weight, "weight", ("layer", "item"))
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


_HALVINGS = 20
_A_LITTLE_LESS = 1 - 1e-6
"""Rounding must not add a replica: the bound would be too high."""


class _Between(NamedTuple):
    """The test fails below, and passes above."""

    below: Float[Array, ""]
    above: Float[Array, ""]


def plan_bound(load: LoadLike, num_replicas: int, num_gpus: int) -> Float[Array, " L"]:
    """A load that the heaviest GPU of no plan stays below, whatever replicas it gives to whom.

    With spares it is the least T that passes this test. In a plan whose heaviest GPU carries T,
    no replica is above T - f, where f is the least that the other c - 1 of its GPU can weigh. So
    an expert of load w has at least ceil(w / (T - f)) replicas; there must be slots enough. The s
    slots left over could all be its own, so that none of its replicas is below
    w / (ceil(w / (T - f)) + s), and the `packing_bound` of such light replicas must not exceed T.
    Such replicas for f = 0 say what f is. Without spares it is `packing_bound`.

    Args:
        load: [L, E] loads in any unit.
        num_replicas: R, physical slots of a layer; a multiple of num_gpus, at least E.
        num_gpus: G.

    Returns:
        The bound of every layer, in the unit of the load.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: num_replicas is no such multiple, `load` is not [L, E], or a load is NaN,
            infinite or negative.

    Example:
        >>> plan_bound([[90, 30, 20, 10]], 6, 3).tolist()
        [50.0]
    """
    array = as_load(load, "load")
    num_replicas = as_count("num_replicas", num_replicas)
    num_gpus = as_count("num_gpus", num_gpus)
    check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus, least=array.shape[1])
    return _plan_bound(array, num_replicas=num_replicas, num_gpus=num_gpus)


@by_layers
@partial(jax.jit, static_argnames=("num_replicas", "num_gpus"))
def _plan_bound(
    load: Float[Array, "L E"], *, num_replicas: int, num_gpus: int
) -> Float[Array, " L"]:
    if num_replicas == load.shape[1]:
        return _packing_bound(load, num_packs=num_gpus)
    return jax.vmap(lambda x: _plan_bound_of_layer(x, num_replicas, num_gpus))(load)


def _plan_bound_of_layer(
    load: Float[Array, " E"], num_replicas: int, num_gpus: int
) -> Float[Array, ""]:
    counts = replicate(load[None], num_replicas).logcnt[0]
    mean = jnp.sum(load) / num_gpus
    below = jnp.maximum(mean, jnp.max(load / counts.astype(load.dtype)))

    def lightest(limit: Float[Array, ""]) -> tuple[Float[Array, " R"], Array]:
        """Replicas lighter than those of any plan that has none above a limit; if there is one."""
        least = jnp.ceil(load / jnp.where(limit > 0, limit, jnp.inf) * _A_LITTLE_LESS)
        least = jnp.maximum(least, 1).astype(jnp.int32)
        over = num_replicas - jnp.sum(least, dtype=jnp.int32)
        share = load / (least + jnp.maximum(over, 0)).astype(load.dtype)
        replicas = jnp.repeat(share, least, total_repeat_length=num_replicas)
        spare = jnp.arange(num_replicas, dtype=jnp.int32) >= num_replicas - over
        return jnp.where(spare, jnp.min(share), replicas), (over >= 0) & (limit > 0)

    def possible(heaviest: Float[Array, ""]) -> Array:
        replicas, _ = lightest(heaviest)
        others = jnp.sum(jnp.sort(replicas)[: num_replicas // num_gpus - 1])
        replicas, enough = lightest(heaviest - others)
        return enough & (_bound_of_layer(replicas, num_gpus) <= heaviest)

    def halve(_: Array | int, between: _Between) -> _Between:
        middle = (between.below + between.above) / 2
        passed = possible(middle)
        return _Between(
            jnp.where(passed, between.below, middle), jnp.where(passed, middle, between.above)
        )

    end = lax.fori_loop(0, _HALVINGS, halve, _Between(below, 2 * below))
    return jnp.where(possible(below * (1 + 1e-6)), below, end.below)
