"""How balanced a plan is under a load that experts split over their replicas, evenly or as told."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eplb_jax.checks import LoadLike, as_count, as_load, check_divides
from eplb_jax.planning.bounds import plan_bound
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement


class Balance(NamedTuple):
    """The load of every GPU, and how even it is; a layer without load is perfectly balanced.

    Attributes:
        gpu_load: In the unit of the load.
        imbalance: Heaviest GPU / mean GPU - 1, per layer: the share of time lost.
        balancedness: Mean GPU / heaviest GPU, per layer.
        mean_imbalance: The mean of `imbalance` over layers.
        mean_balancedness: The mean of `balancedness` over layers.
    """

    gpu_load: Float[Array, "L G"]
    imbalance: Float[Array, " L"]
    balancedness: Float[Array, " L"]
    mean_imbalance: Float[Array, ""]
    mean_balancedness: Float[Array, ""]


def balance(
    load: LoadLike,
    placement: Placement,
    num_gpus: int,
    *,
    split: Float[Array, "L R"] | None = None,
) -> Balance:
    """Measure a plan on a load, which need not be the one it was made for.

    Args:
        load: [L, E] loads in any unit.
        placement: The plan, for the same layers and experts.
        num_gpus: G; divides the number of slots.
        split: The share of every slot in the load of its expert, as of `runtime.split_load`; None:
            all replicas take the same.

    Returns:
        GPU loads, imbalance and balancedness.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load, plan and split do not fit, num_gpus does not divide the number of
            slots, or a load is NaN, infinite or negative.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[100, 200]], 2, 1, 1, 2)
        >>> balance([[100, 200]], plan, 2).balancedness.tolist()
        [0.75]
    """
    return evenness(gpu_loads(load, placement, num_gpus, split=split))


def gpu_loads(
    load: LoadLike,
    placement: Placement,
    num_gpus: int,
    *,
    split: Float[Array, "L R"] | None = None,
) -> Float[Array, "L G"]:
    """The load of every GPU, in the unit of the load. Arguments and errors are those of `balance`.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[100, 200]], 2, 1, 1, 2)
        >>> gpu_loads([[100, 200]], plan, 2).tolist()
        [[100.0, 200.0]]
    """
    array = as_load(load, "load")
    if placement.logcnt.shape != array.shape:
        raise ValueError(
            f"load has the shape {array.shape}, but the plan is for {placement.logcnt.shape}"
        )
    num_gpus = as_count("num_gpus", num_gpus)
    check_divides("num_gpus", num_gpus, "number of slots", placement.phy2log.shape[1])
    if split is not None and split.shape != placement.phy2log.shape:
        raise ValueError(
            f"split has the shape {split.shape}, but the plan is for {placement.phy2log.shape}"
        )
    return _gpu_loads(array, placement, split, num_gpus=num_gpus)


def gap(load: LoadLike, placement: Placement, num_gpus: int) -> Float[Array, " L"]:
    """How far the heaviest GPU of every layer is, at most, from that of the best plan.

    Heaviest GPU / `plan_bound` - 1: no plan of as many slots is better by more. Zero for a
    layer without load. Arguments and errors are those of `balance`.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[100, 200]], 2, 1, 1, 2)
        >>> gap([[100, 200]], plan, 2).tolist()
        [0.0]
    """
    heaviest = jnp.max(balance(load, placement, num_gpus).gpu_load, axis=1)
    bound = plan_bound(load, placement.phy2log.shape[1], num_gpus)
    return jnp.where(bound > 0, heaviest / jnp.where(bound > 0, bound, 1), 1) - 1


@by_layers
@partial(jax.jit, static_argnames="num_gpus")
def _gpu_loads(
    load: Float[Array, "L E"],
    placement: Placement,
    split: Float[Array, "L R"] | None,
    *,
    num_gpus: int,
) -> Float[Array, "L G"]:
    per_replica = load if split is not None else load / placement.logcnt.astype(jnp.float32)
    per_slot = jnp.take_along_axis(per_replica, placement.phy2log, axis=1)
    per_slot = per_slot if split is None else per_slot * split
    num_layers, num_slots = per_slot.shape
    by_gpu = per_slot.reshape(num_layers, num_gpus, num_slots // num_gpus)
    return jnp.sum(by_gpu, axis=2)


def evenness(gpu_load: Float[Array, "L G"]) -> Balance:
    """The metrics of known GPU loads.

    Example:
        >>> float(evenness(jnp.array([[100.0, 200.0], [100.0, 200.0]])).mean_balancedness)
        0.75
    """
    mean, heaviest = jnp.mean(gpu_load, axis=1), jnp.max(gpu_load, axis=1)
    busy = heaviest > 0
    imbalance = jnp.where(busy, heaviest / jnp.where(busy, mean, 1), 1) - 1
    balancedness = jnp.where(busy, mean / jnp.where(busy, heaviest, 1), 1)
    return Balance(gpu_load, imbalance, balancedness, jnp.mean(imbalance), jnp.mean(balancedness))
