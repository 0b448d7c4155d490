"""Shares of the replicas of every expert in its current load, so that GPUs are balanced."""

from functools import partial

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.planning.placement import as_placement
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.splitting.shares import split_of_layers
from eplb_jax.types import Placement, Topology, check_topology


def split_load(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology,
    *,
    steps: int = 80,
    start: Float[Array, "*TL R"] | None = None,
) -> Float[Array, "*TL R"]:
    """The share of every slot in the current load of its expert, for balanced GPUs.

    A plan is made for past loads, and for replicas that share a load equally. Once the tokens of a
    step are routed, other shares can balance GPUs better. The shares minimise the maximum GPU load,
    a linear program, to a relative error of a few 1e-4, and of 2e-3 where replicas link 64 GPUs in
    a chain. `to_physical` follows them by ``choice="shares"``.

    The method minimises the sum of squared GPU loads, which minimises the maximum too, by projected
    gradient steps with momentum and restarts. A step takes O(R).

    Args:
        load: Loads in any unit, summed over all GPUs: [L, E], [T, L, E] of T windows, or [E] of one
            layer.
        placement: The plan, or its phy2log [L, R] or [R], for the same layers and experts.
        topology: GPUs and slots; as many slots as the plan has.
        steps: Gradient steps. 32 are enough for plans of `eplb_jax.plan`, and 8 from the shares of
            a similar load; long chains need more.
        start: Shares to begin with, as of the last step's load under the same plan: [L, R],
            [T, L, R] or [R]. Those of an expert are divided by their sum. None: equal shares.

    Returns:
        Shares, float32 [L, R], [T, L, R] or [R], with sum 1 over the slots of an expert; equal
        shares where it has no load. The maximum GPU load is at most that of equal shares, up to
        rounding.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load, plan and topology do not fit, the plan is invalid, or a load is NaN,
            infinite or negative.

    Example:
        >>> split_load([3, 3, 1, 1], [0, 2, 0, 1, 0, 3], Topology(3, slots=2)).round(2).tolist()
        [0.5, 1.0, 0.0, 1.0, 0.5, 1.0]

    References:
        Beck & Teboulle, A fast iterative shrinkage-thresholding algorithm (2009); O'Donoghue &
        Candes, Adaptive restart for accelerated gradient schemes (2015). DeepSeek-AI, LPLB: the
        same program by an interior-point method.
    """
    array, steps = jnp.asarray(as_load(load, "load")), as_count("steps", steps, least=0)
    plan = as_placement(placement, "placement", array.shape[-1])
    if plan.logcnt.shape != array.shape[-2:]:
        raise ValueError(
            f"load has the shape {array.shape}, but the plan is for {plan.logcnt.shape}"
        )
    check_topology(topology, plan.phy2log.shape[-1])
    _ = topology.slots_per_gpu  # raises where GPUs differ
    if start is not None:
        start = jnp.asarray(start, jnp.float32)
        shapes = plan.phy2log.shape, array.shape[:-1] + plan.phy2log.shape[-1:]
        if start.shape not in shapes:
            raise ValueError(f"start has the shape {start.shape}, but the plan is for {shapes[-1]}")
    split = partial(split_of_layers, num_gpus=topology.num_gpus, steps=steps)
    return under_auto(split, PartitionSpec(*spec_of(array)[:-1]), array, *plan[::2], start)
