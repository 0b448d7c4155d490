"""How many replicas every expert gets."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import along, first_equal, sanitise, unfused
from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.sharding import by_layers
from eplb_jax.types import Replication


def replicate_experts(weight: LoadLike, num_phy: int) -> Replication:
    """The number of replicas of every expert: each spare goes to the largest load per replica.

    This minimises the maximum load of a replica. Ties go to the lowest expert. A layer without
    load counts as one of equal loads, so its spares go to distinct experts.

    Args:
        weight: [L, E] loads in any unit; anything `jnp.asarray` takes.
        num_phy: R, the replicas of a layer in total; at least E.

    Returns:
        The expert of every replica and its rank among the replicas of its expert, each int32
        [L, R]: every expert once, then the spares in the order in which they were assigned; and
        the number of replicas of every expert, int32 [L, E].

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: num_phy is less than E, `weight` is not [L, E], or a load is NaN,
            infinite or negative.

    Example:
        >>> replication = replicate_experts([[6, 3, 2]], 5)
        >>> replication.phy2log.tolist(), replication.logcnt.tolist()
        ([[0, 1, 2, 0, 0]], [[3, 1, 1]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): the function of this name. The rule is
        D'Hondt's apportionment (V. D'Hondt, 1882).
    """
    load = as_load(weight, "weight", ("layer", "expert"), least_axes=2)
    return _replicate_experts(load, num_phy=as_count("num_phy", num_phy, least=load.shape[1]))


@by_layers
@partial(jax.jit, static_argnames="num_phy")
def _replicate_experts(weight: Float[Array, "L E"], *, num_phy: int) -> Replication:
    load = sanitise(weight)
    idle = jnp.all(load == 0, axis=1, keepdims=True)
    return replicate(jnp.where(idle, 1, load), num_phy)


def replicate(
    load: Float[Array, "L E"],
    num_phy: int,
    most: int | None = None,
    offset: float = 0,
    empty: Int32[Array, " L"] | None = None,
) -> Replication:
    """`replicate_experts` as DeepSeek has it: the spares of a layer without load go to expert 0.

    One spare a step, O(E) each: on a CPU several times faster than sorting all quotients. `most`
    limits the replicas of an expert; `offset` is added to counts before loads are divided by them.
    With `empty`, the last expert stands for so many empty slots, and only counts are valid.
    """
    num_experts = load.shape[1]
    load = load.T
    expert = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    start = jnp.ones(load.shape, jnp.int32)
    spares = num_phy - num_experts
    if empty is not None:
        start, spares = start.at[-1].set(empty), spares + 1

    def give(count: Int32[Array, "E L"], step: Array) -> tuple[Array, tuple[Array, Array]]:
        quotient = load / (count.astype(jnp.float32) + offset)
        if most is not None:
            quotient = jnp.where(count < most, quotient, -1)
        if empty is not None:
            quotient = quotient.at[-1].set(-2)
        chosen = first_equal(quotient, jnp.max(quotient, axis=0))
        here = expert == chosen[None]
        if empty is not None:
            here &= (step < spares - empty)[None]
        rank = jnp.max(jnp.where(here, count, 0), axis=0)
        return jnp.where(here, count + 1, count), (chosen, rank)

    with jax.named_scope("replicas"):
        logcnt, (chosen, rank) = lax.scan(give, start, jnp.arange(spares, dtype=jnp.int32))
    once = jnp.broadcast_to(expert, load.shape)
    phy2log = jnp.concatenate([once, chosen])
    return Replication(phy2log.T, jnp.concatenate([jnp.zeros_like(once), rank]).T, logcnt.T)


def list_replicas(logcnt: Int32[Array, "L E"], num_phy: int) -> Replication:
    """Replicas from their counts, those of one expert consecutive."""
    first = jnp.cumsum(logcnt, axis=1, dtype=jnp.int32) - logcnt
    expert = jnp.arange(logcnt.shape[1], dtype=jnp.int32)
    slot = jnp.arange(num_phy, dtype=jnp.int32)
    phy2log = jax.vmap(lambda x: jnp.repeat(expert, x, total_repeat_length=num_phy))(logcnt)
    return Replication(phy2log, slot[None] - along(first, phy2log, 1), logcnt)


_MARGINS = (1.0, 0.5, 0.75, 1.5)
"""Shares of an expert's peak over its mean that are added to its load."""

_FEW = 128
"""Number of slots up to which all margins are tried for two or three slots a GPU. With more slots
or more of them a GPU none of them is better than the first."""


def counts_over_windows(
    load: Float[Array, "L E"],
    above: Float[Array, "L E"],
    num_replicas: int,
    num_gpus: int,
    most: int | None,
    empty: Int32[Array, " L"] | None = None,
) -> Int32[Array, "L k E"]:
    """Replica counts to choose from by packing them over windows.

    Each are the greedy counts for the mean load plus a share of `above`, the peak over it: a
    missing replica costs more than an idle one. `empty` is that of `replicate`.
    """
    several = num_replicas <= _FEW and num_replicas <= 3 * num_gpus
    margins = _MARGINS if several else _MARGINS[:1]
    loads = [load + unfused(k * above) for k in margins]
    counts = [replicate(x, num_replicas, most, empty=empty).logcnt for x in loads]
    return jnp.stack(counts, axis=1)
