"""The least maximum GPU load of a plan under any split."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from eplb_jax.checks import LoadLike, as_experts, as_load
from eplb_jax.evaluation.metrics import gpu_loads
from eplb_jax.splitting.sets import (
    MOST_GPUS,
    all_sets,
    experts_on_gpus,
    loads_inside,
    prefix_ratios,
    replicas_outside,
)
from eplb_jax.types import Placement, Topology


def split_bound(
    load: LoadLike, placement: Placement | LoadLike, topology: Topology | int
) -> Float[Array, "*TL"]:
    """The smallest possible maximum GPU load of a plan, whatever the split.

    That is the maximum, over sets of GPUs, of the load of experts whose replicas are all in the
    set, divided by its size. Exact for up to 12 GPUs. With more it is a lower bound, from the sets
    of most loaded GPUs under a good split: within 5e-3 of what that split reaches, mostly 1e-3.

    Args:
        load: Loads in any unit: [L, E], [T, L, E] of T windows, or [E] of one layer.
        placement: The plan, or its phy2log [L, R] or [R].
        topology: GPUs, with equally many slots; or their number.

    Returns:
        The load in the unit of the load, with the leading axes of the load.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `balance`.

    Example:
        >>> split_bound([3, 3, 1, 1], [0, 2, 0, 1, 0, 3], 3).tolist()
        3.0

    References:
        Duality of the linear program of LPLB (DeepSeek-AI); MicroMoE, 2511.16947, has the sets as
        dense subgraphs.
    """
    gpu_load = gpu_loads(load, placement, topology, split="flexible")
    array = jnp.asarray(as_load(load, "load"))
    phy2log = as_experts(placement, "placement")
    return _split_bound(
        array, jnp.broadcast_to(phy2log, (*array.shape[:-1], phy2log.shape[-1])), gpu_load
    )


@jax.jit
def _split_bound(
    load: Float[Array, "*TL E"], phy2log: Int32[Array, "*TL R"], gpu_load: Float[Array, "*TL G"]
) -> Float[Array, "*TL"]:
    num_gpus = gpu_load.shape[-1]

    def of_layer(load: Array, phy2log: Array, gpu_load: Array) -> Float[Array, ""]:
        if num_gpus > MOST_GPUS:
            return jnp.max(prefix_ratios(load, phy2log, gpu_load)[0])
        sets = jnp.asarray(all_sets(num_gpus))
        held = experts_on_gpus(phy2log, load.shape[0], num_gpus)
        inside = loads_inside(load[None], replicas_outside(held, sets))[:, 0]
        return jnp.max(inside / jnp.sum(sets, axis=1, dtype=jnp.int32).astype(jnp.float32))

    return jnp.vectorize(of_layer, signature="(e),(r),(g)->()")(load, phy2log, gpu_load)
