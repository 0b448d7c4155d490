"""A lower bound on the maximum GPU load of any plan."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from eplb_jax.checks import LoadLike, as_count, as_load, check_multiple
from eplb_jax.packing.bounds import _bound_of_layer, _packing_bound
from eplb_jax.planning.replication import replicate
from eplb_jax.sharding import by_layers

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
