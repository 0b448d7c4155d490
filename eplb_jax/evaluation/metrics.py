"""How balanced a plan is under a load that experts split over their replicas."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Num
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_experts, as_load
from eplb_jax.planning.bounds import plan_bound
from eplb_jax.planning.cost import Cost, Curve, curve_of, time_loads
from eplb_jax.planning.gpus import as_speed
from eplb_jax.planning.placement import as_placement
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.splitting.shares import split_of_layers
from eplb_jax.types import Placement, Topology, as_topology

_SPLIT_STEPS = 128
"""Steps of a flexible split: measured plans are within 1e-4 of the optimum, long chains in 5e-3."""


class Balance(NamedTuple):
    """The load of every GPU, and how balanced it is; a layer without load is perfectly balanced.

    All but the means have the leading axes of the load: [L] for one window, [T, L] for several,
    none for one layer.

    Attributes:
        gpu_load: Load of every GPU, in the unit of the load.
        imbalance: Max / mean GPU load - 1: the overhead over perfect balance.
        balancedness: Mean / max GPU load. 1 - balancedness is the share of time lost to waiting.
        mean_imbalance: The mean of `imbalance` over all layers and windows with load; 0 if none.
        mean_balancedness: The mean of `balancedness` over these; 1 if there are none.
    """

    gpu_load: Float[Array, "*TL G"]
    imbalance: Float[Array, "*TL"]
    balancedness: Float[Array, "*TL"]
    mean_imbalance: Float[Array, ""]
    mean_balancedness: Float[Array, ""]


def balance(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    split: Float[Array, "*TL R"] | Literal["flexible"] | None = None,
    speed: ArrayLike | Array | None = None,
    cost: Cost | None = None,
) -> Balance:
    """The balance of a plan under a load, which need not be the one it was made for.

    GPUs without any expert, dead ones or those without slots, are not counted.

    Args:
        load: Loads in any unit: [L, E], [T, L, E] of T windows, or [E] of one layer.
        placement: The plan, or its phy2log [L, R] or [R], for the same layers and experts.
        topology: GPUs and slots, as many slots as the plan has; or the number of GPUs.
        split: The share of every slot in the load of its expert, as of `runtime.split_load`:
            [L, R], [T, L, R] or [R]. "flexible": as `runtime.split_load` divides this load, which
            needs GPUs with equally many slots. None: the replicas of an expert share its load
            equally.
        speed: Of every GPU, [G], in any unit: the balance is that of load / speed. None: equal.
        cost: The balance is that of the time of GPUs, in the unit of the cost, which replaces the
            load; it needs equal shares. None: of the load.

    Returns:
        GPU loads, imbalance and balancedness, with the leading axes of the load, and their means.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load, plan, topology and split do not fit, the plan is invalid, a load is NaN,
            infinite or negative, or there are both a cost and a split.

    Example:
        >>> balance([[100, 200]], [[0, 1]], Topology(2, slots=1)).balancedness.tolist()
        [0.75]
    """
    loads = gpu_loads(load, placement, topology, split=split, cost=cost)
    held = as_experts(placement, "placement") >= 0
    topology = as_topology(topology, held.shape[-1])
    live = jnp.zeros((*held.shape[:-1], topology.num_gpus), bool)
    live = live.at[..., jnp.asarray(topology.gpu_of_slot)].max(held)
    return balance_of(loads, live, as_speed(speed, topology))


def gpu_loads(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    split: Float[Array, "*TL R"] | Literal["flexible"] | None = None,
    cost: Cost | None = None,
) -> Float[Array, "*TL G"]:
    """The load of every GPU, in the unit of the load. Arguments and errors are those of `balance`.

    With a cost it is the time of every GPU, in the unit of the cost.

    Example:
        >>> gpu_loads([[100, 200]], [[0, 1, 1, 0]], Topology(2, slots=2)).tolist()
        [[150.0, 150.0]]
        >>> reads = Cost(per_token=0.01, per_active_expert=5)
        >>> gpu_loads([[100, 200]], [[0, 1]], Topology(2, slots=1), cost=reads).tolist()
        [[6.0, 7.0]]
    """
    array = as_load(load, "load")
    if not isinstance(cost, Cost | None):
        raise TypeError(
            f"cost must be an eplb_jax.Cost, got {cost!r}; for example Cost(per_token=1e-6)"
        )
    if cost is not None and split is not None:
        raise ValueError("cost is that of replicas with equal shares, got a split, too; give one")
    plan = as_placement(placement, "placement", array.shape[-1])
    if plan.logcnt.shape != array.shape[-2:]:
        raise ValueError(
            f"load has the shape {array.shape}, but the plan is for {plan.logcnt.shape}"
        )
    topology = as_topology(topology, plan.phy2log.shape[-1])
    if isinstance(split, str):
        if split != "flexible":
            raise ValueError(f'split={split!r} is not known; nearest: split="flexible"')
        _ = topology.slots_per_gpu  # raises where GPUs differ
        shares = partial(split_of_layers, num_gpus=topology.num_gpus, steps=_SPLIT_STEPS)
        leading = PartitionSpec(*spec_of(array)[:-1])
        split = under_auto(shares, leading, jnp.asarray(array), *plan[::2])
    if split is not None:
        split = jnp.asarray(split, jnp.float32)
        shapes = plan.phy2log.shape, array.shape[:-1] + plan.phy2log.shape[-1:]
        if split.shape not in shapes:
            raise ValueError(f"split has the shape {split.shape}, but the plan is for {shapes[0]}")
    loads = partial(_gpu_loads, topology=topology)
    leading = PartitionSpec(*spec_of(array)[:-1])
    curve = None if cost is None else curve_of(cost)
    return under_auto(loads, leading, array, plan.phy2log, plan.logcnt, split, curve)


@partial(jax.jit, static_argnames="topology")
def _gpu_loads(
    load: Float[Array, "*TL E"],
    phy2log: Int32[Array, "*L R"],
    logcnt: Int32[Array, "*L E"],
    split: Float[Array, "... R"] | None,
    curve: Curve | None,
    *,
    topology: Topology,
) -> Float[Array, "*TL G"]:
    leading = load.shape[:-1]
    if curve is not None:
        load = time_loads(load, jnp.broadcast_to(logcnt, load.shape), curve)
    count = jnp.broadcast_to(logcnt, load.shape).astype(jnp.float32)
    per_replica = load if split is not None else load / count
    expert = jnp.broadcast_to(phy2log, (*leading, phy2log.shape[-1]))
    per_slot = jnp.take_along_axis(per_replica, expert, axis=-1)
    per_slot = per_slot if split is None else per_slot * jnp.broadcast_to(split, per_slot.shape)
    per_slot = jnp.where(expert < 0, 0, per_slot)
    if isinstance(topology.slots, int):
        return jnp.sum(per_slot.reshape(*leading, topology.num_gpus, -1), axis=-1)
    gpu = jnp.asarray(topology.gpu_of_slot)
    return jnp.zeros((*leading, topology.num_gpus), jnp.float32).at[..., gpu].add(per_slot)


def gpu_loads_in_order(
    load: Num[np.ndarray, "... E"], num_gpus: int, cost: Cost | None = None
) -> Num[np.ndarray, "... G"]:
    """GPU loads, or times, without a balancer: no replicas, expert e on GPU e * G // E.

    Example:
        >>> gpu_loads_in_order(np.ones((1, 5)), 2).tolist()
        [[3.0, 2.0]]
    """
    gpu = np.arange(load.shape[-1]) * num_gpus // load.shape[-1]
    if cost is not None:
        array = jnp.asarray(load, jnp.float32)
        load = np.asarray(time_loads(array, jnp.ones(array.shape, jnp.int32), curve_of(cost)))
    return np.stack([load[..., gpu == g].sum(axis=-1) for g in range(num_gpus)], axis=-1)


def gap(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    split: Literal["flexible"] | None = None,
    speed: ArrayLike | Array | None = None,
    cost: Cost | None = None,
) -> Float[Array, "*TL"]:
    """An upper bound on the optimality gap: max GPU load / `plan_bound` - 1.

    No plan of as many slots has a max GPU load that is lower by more. Zero for a layer without
    load. Arguments and errors are those of `balance`.

    Example:
        >>> gap([[100, 200]], [[0, 1]], Topology(2, slots=1)).tolist()
        [0.0]
    """
    loads = gpu_loads(load, placement, topology, split=split, cost=cost)
    topology = as_topology(topology, as_experts(placement, "placement").shape[-1])
    paces = as_speed(speed, topology)
    most = jnp.max(
        loads if paces is None else loads / jnp.broadcast_to(paces, loads.shape), axis=-1
    )
    bound = plan_bound(load, topology, split=split, speed=speed, cost=cost)
    return jnp.where(bound > 0, most / jnp.where(bound > 0, bound, 1), 1) - 1


def balance_of(
    gpu_load: Float[Array, "*TL G"],
    live: Bool[Array, "*L G"] | None = None,
    speed: Float[Array, " G"] | None = None,
) -> Balance:
    """The balance of known GPU loads, over the GPUs that are live.

    Example:
        >>> float(balance_of(jnp.array([[100.0, 200.0], [0.0, 0.0]])).mean_balancedness)
        0.75
    """
    live = jnp.ones(gpu_load.shape[-1], bool) if live is None else live
    each = jnp.ones(gpu_load.shape[-1], jnp.float32) if speed is None else speed
    live = jnp.broadcast_to(live, gpu_load.shape)
    capacity = jnp.sum(jnp.where(live, jnp.broadcast_to(each, live.shape), 0), axis=-1)
    mean = jnp.sum(gpu_load, axis=-1) / jnp.maximum(capacity, jnp.finfo(jnp.float32).tiny)
    most = jnp.maximum(
        jnp.max(gpu_load / jnp.broadcast_to(each, gpu_load.shape), axis=-1), mean
    )  # a rounded mean may be above the max
    busy = most > 0
    imbalance = jnp.where(busy, most / jnp.where(busy, mean, 1), 1) - 1
    balancedness = jnp.where(busy, mean / jnp.where(busy, most, 1), 1)
    count = jnp.sum(busy).astype(jnp.float32)
    lost = jnp.sum(imbalance) / jnp.maximum(count, 1)  # zero where there is no load
    kept = jnp.sum(jnp.where(busy, balancedness, 0)) / jnp.maximum(count, 1)
    return Balance(gpu_load, imbalance, balancedness, lost, jnp.where(count > 0, kept, 1))
