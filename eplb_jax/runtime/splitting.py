"""Shares of the replicas of every expert in its current load, so that GPUs are balanced."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, Integer
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.planning.placement import as_placement
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.splitting.shares import split_of_layers
from eplb_jax.types import Placement, Topology, check_topology


def split_load(
    load: LoadLike, placement: Placement | LoadLike, topology: Topology, *, steps: int = 64
) -> Float[Array, "*TL R"]:
    """The share of every slot in the current load of its expert, for balanced GPUs.

    A plan is made for past loads, and for replicas that share a load equally. Once the tokens of a
    step are routed, other shares can balance GPUs better. The shares minimise the maximum GPU load,
    a linear program, to a relative error of a few 1e-4, and of 5e-3 where replicas link GPUs in
    long chains. `to_physical` follows them by ``choice="shares"``.

    The method minimises the sum of squared GPU loads, which minimises the maximum too, by projected
    gradient steps with momentum and restarts. A step takes O(R).

    Args:
        load: Loads in any unit, summed over all GPUs: [L, E], [T, L, E] of T windows, or [E] of one
            layer.
        placement: The plan, or its phy2log [L, R] or [R], for the same layers and experts.
        topology: GPUs and slots; as many slots as the plan has.
        steps: Gradient steps. 32 are enough for plans of `eplb_jax.plan`; long chains need more.

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
    split = partial(split_of_layers, num_gpus=topology.num_gpus, steps=steps)
    return under_auto(split, PartitionSpec(*spec_of(array)[:-1]), array, *plan[::2])


class Quotas(NamedTuple):
    """The tokens of every slot, and how many of its expert come before them.

    Token i of an expert, numbered from 0 as tokens come, goes to the slot with
    first <= i < first + tokens: a kernel finds it by comparison.
    """

    tokens: Int32[Array, "*TL R"]
    first: Int32[Array, "*TL R"]


def quotas(
    load: Integer[Array, "*TL E"] | ArrayLike,
    placement: Placement | LoadLike,
    shares: Float[Array, "*TL R"],
) -> Quotas:
    """Shares of a load as whole tokens, each within one of its share, that add up to the load.

    Args:
        load: Tokens of every expert, whole numbers below 2^31: [L, E], [T, L, E], or [E].
        placement: The plan, or its phy2log [L, R] or [R].
        shares: Of every slot in the load of its expert, as of `split_load`; with the leading axes
            of the load. Those of an expert are divided by their sum; where that is 0, its first
            slot gets all.

    Returns:
        Tokens and first tokens of every slot, int32 of the shape of `shares`.

    Raises:
        TypeError: The load does not hold integers, or an argument is of the wrong kind.
        ValueError: Load, plan and shares do not fit, or the plan is invalid.

    Example:
        >>> result = quotas([5, 3], [0, 1, 0, 1], jnp.array([0.5, 1.0, 0.5, 0.0]))
        >>> result.tokens.tolist(), result.first.tolist()
        ([2, 3, 3, 0], [0, 0, 2, 3])
    """
    count, shares = jnp.asarray(load), jnp.asarray(shares, jnp.float32)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"load must hold whole tokens, got dtype {count.dtype}")
    plan = as_placement(placement, "placement", count.shape[-1])
    wanted = (*count.shape[:-1], plan.phy2log.shape[-1])
    if plan.logcnt.shape != count.shape[-plan.logcnt.ndim :] or shares.shape != wanted:
        raise ValueError(
            f"load has the shape {count.shape} and shares {shares.shape}, but the plan is for "
            f"{plan.logcnt.shape} and {plan.phy2log.shape}"
        )
    leading = PartitionSpec(*spec_of(count)[:-1])
    return under_auto(_quotas, leading, count.astype(jnp.int32), shares, *plan[:2])


@jax.jit
def _quotas(
    load: Int32[Array, "*TL E"],
    shares: Float[Array, "*TL R"],
    phy2log: Int32[Array, "*L R"],
    log2phy: Int32[Array, "*L E X"],
) -> Quotas:
    def of_layer(load: Array, shares: Array, phy2log: Array, log2phy: Array) -> tuple[Array, Array]:
        num_slots = phy2log.shape[0]
        slot = jnp.where(log2phy < 0, num_slots, log2phy)  # [E, X], in the order of ranks
        listed = jnp.concatenate([shares, jnp.zeros(1, shares.dtype)])[slot]
        total = jnp.cumsum(listed, axis=1)
        whole = total[:, -1:]
        # XLA may divide by way of the inverse, so that the last part is below 1.
        part = total * (1 / jnp.where(whole > 0, whole, 1))
        ends = jnp.round(part * load[:, None].astype(jnp.float32)).astype(jnp.int32)
        ends = jnp.where(total >= whole, load[:, None], jnp.minimum(ends, load[:, None]))
        first = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        empty = jnp.zeros(num_slots + 1, jnp.int32)
        tokens = empty.at[slot].set(ends - first)[:num_slots]
        return tokens, empty.at[slot].set(first)[:num_slots]

    phy2log, log2phy = (
        jnp.broadcast_to(x, (*load.shape[:-1], *x.shape[n:]))
        for x, n in ((phy2log, phy2log.ndim - 1), (log2phy, log2phy.ndim - 2))
    )
    return Quotas(
        *jnp.vectorize(of_layer, signature="(e),(r),(r),(e,x)->(r),(r)")(
            load, shares, phy2log, log2phy
        )
    )
