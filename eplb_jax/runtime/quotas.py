"""Shares of loads as whole tokens: how many go to every slot, and from where."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, Integer
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike
from eplb_jax.planning.placement import as_placement
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import Placement, Topology, check_topology


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


def local_quotas(
    sent: Integer[Array, "*TL G E"] | ArrayLike,
    placement: Placement | LoadLike,
    shares: Float[Array, "*TL R"],
    topology: Topology,
) -> Quotas:
    """`quotas`, divided over the GPUs that tokens come from so that few leave their GPU or node.

    Every slot gets as many tokens as by `quotas` of the sum over GPUs. Of each expert as many
    tokens as possible stay on their GPU, then as many of the others as possible on their node.

    Args:
        sent: Tokens of every expert on the GPU that they come from, whole numbers: [L, G, E],
            [T, L, G, E], or [G, E]; less than 2^31 of an expert in total.
        placement: The plan, or its phy2log [L, R] or [R].
        shares: As of `quotas`, without the axis of GPUs.
        topology: GPUs, their slots and nodes.

    Returns:
        Tokens from every GPU to every slot, int32 [..., G, R], and the first of them: token i of an
        expert, numbered from 0 on its own GPU, goes to the slot with first <= i < first + tokens.

    Raises:
        TypeError: `sent` does not hold integers, or an argument is of the wrong kind.
        ValueError: Tokens, plan, shares and topology do not fit, or the plan is invalid.

    Example:
        >>> sent, plan = [[4, 0], [2, 6]], [0, 1, 0, 1]
        >>> shares = jnp.array([0.5, 0.0, 0.5, 1.0])
        >>> local_quotas(sent, plan, shares, Topology(2, slots=2)).tokens.tolist()
        [[3, 0, 1, 0], [0, 0, 2, 6]]
    """
    count, shares = jnp.asarray(sent), jnp.asarray(shares, jnp.float32)
    check_topology(topology, shares.shape[-1])
    if count.ndim < 2 or count.shape[-2] != topology.num_gpus:
        raise ValueError(
            f"sent must have {topology.num_gpus} GPUs in its last axis but one, got the shape "
            f"{count.shape}"
        )
    whole = quotas(jnp.sum(count, axis=-2, dtype=count.dtype), placement, shares)
    phy2log = as_placement(placement, "placement", count.shape[-1]).phy2log
    divide = partial(_divide, topology=topology)
    leading = PartitionSpec(*spec_of(count)[:-2])
    return under_auto(divide, leading, count.astype(jnp.int32), whole.tokens, phy2log)


@partial(jax.jit, static_argnames="topology")
def _divide(
    sent: Int32[Array, "*TL G E"],
    tokens: Int32[Array, "*TL R"],
    phy2log: Int32[Array, "*L R"],
    *,
    topology: Topology,
) -> Quotas:
    gpu, node = (jnp.asarray(x) for x in (topology.gpu_of_slot, topology.node_of_gpu))
    here = jnp.arange(topology.num_gpus, dtype=jnp.int32)

    def before(same: Array) -> Int32[Array, "n n"]:
        """1 for each two rows of which the second comes before the first in a group."""
        return jnp.tril(same, -1).astype(jnp.int32)

    def of_layer(sent: Array, tokens: Array, phy2log: Array) -> tuple[Array, Array]:
        expert = jnp.maximum(phy2log, 0)  # empty slots get no tokens
        alike = expert[:, None] == expert[None]
        total = jnp.zeros((topology.num_gpus, tokens.size), jnp.int32)
        for group in (here, node, jnp.zeros_like(here)):
            # In a group, tokens and slots are intervals of one line; they meet where they overlap.
            of_slot = group[gpu]
            slots = before(alike & (of_slot[:, None] == of_slot[None])) @ tokens
            sources = (before(group[:, None] == group[None]) @ sent)[:, expert]
            ends = jnp.minimum(sources + sent[:, expert], (slots + tokens)[None])
            kept = jnp.maximum(ends - jnp.maximum(sources, slots[None]), 0)
            kept = jnp.where(group[:, None] == of_slot[None], kept, 0)
            total, tokens = total + kept, tokens - jnp.sum(kept, axis=0, dtype=jnp.int32)
            sent = sent.at[:, expert].add(-kept)
        return total, total @ before(alike).T

    phy2log = jnp.broadcast_to(phy2log, tokens.shape)
    signature = "(g,e),(r),(r)->(g,r),(g,r)"
    return Quotas(*jnp.vectorize(of_layer, signature=signature)(sent, tokens, phy2log))
