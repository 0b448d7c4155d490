"""How many replicas every expert gets."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import along, first_equal, sanitise, unfused
from eplb_jax.checks import LoadLike, as_count, as_load, check_multiple
from eplb_jax.sharding import by_layers
from eplb_jax.types import Replication


def replicate_experts(weight: LoadLike, num_phy: int) -> Replication:
    """Give the spare replicas of every layer, one by one, to the expert of most load per replica.

    This minimises the largest load of a replica. Ties go to the lowest expert. A layer
    without any load counts as one of equal loads, so that its spares go to distinct experts.

    Args:
        weight: [L, E] loads in any unit; anything `jnp.asarray` takes.
        num_phy: R, how many replicas a layer has in all; at least E.

    Returns:
        The expert of every replica and the replica's rank among those of its expert, each int32
        [L, R]: first every expert once, then the spares as they were given; and the number of
        replicas of every expert, int32 [L, E].

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
    num_phy = as_count("num_phy", num_phy)
    check_multiple("num_phy", num_phy, "1", 1, least=load.shape[1])
    return _replicate_experts(load, num_phy=num_phy)


@by_layers
@partial(jax.jit, static_argnames="num_phy")
def _replicate_experts(weight: Float[Array, "L E"], *, num_phy: int) -> Replication:
    load = sanitise(weight)
    idle = jnp.all(load == 0, axis=1, keepdims=True)
    return replicate(jnp.where(idle, 1, load), num_phy)


def replicate(
    load: Float[Array, "L E"], num_phy: int, most: int | None = None, offset: float = 0
) -> Replication:
    """`replicate_experts` as DeepSeek has it: the spares of a layer without load to expert 0.

    With `most`, which must leave room for all, no expert gets more replicas than that. `offset` is
    added to counts before loads are divided by them.

    One spare a step, O(E) each: on a CPU several times faster than sorting all quotients.
    """
    num_experts = load.shape[1]

    load = load.T
    expert = jnp.arange(num_experts, dtype=jnp.int32)[:, None]

    def give(count: Int32[Array, "E L"], _: None) -> tuple[Array, tuple[Array, Array]]:
        quotient = load / (count.astype(jnp.float32) + offset)
        if most is not None:
            quotient = jnp.where(count < most, quotient, -1)
        chosen = first_equal(quotient, jnp.max(quotient, axis=0))
        here = expert == chosen
        rank = jnp.max(jnp.where(here, count, 0), axis=0)
        return jnp.where(here, count + 1, count), (chosen, rank)

    with jax.named_scope("replicas"):
        start = jnp.ones(load.shape, jnp.int32)
        logcnt, (chosen, rank) = lax.scan(give, start, length=num_phy - num_experts)
    once = jnp.broadcast_to(expert, load.shape)
    phy2log = jnp.concatenate([once, chosen])
    return Replication(phy2log.T, jnp.concatenate([jnp.zeros_like(once), rank]).T, logcnt.T)


def list_replicas(logcnt: Int32[Array, "L E"], num_phy: int) -> Replication:
    """Replicas in these numbers, those of one expert next to each other."""
    first = jnp.cumsum(logcnt, axis=1, dtype=jnp.int32) - logcnt
    expert = jnp.arange(logcnt.shape[1], dtype=jnp.int32)
    slot = jnp.arange(num_phy, dtype=jnp.int32)
    repeat = lambda counts: jnp.repeat(expert, counts, total_repeat_length=num_phy)  # noqa: E731
    phy2log = jax.vmap(repeat)(logcnt)
    return Replication(phy2log, slot - along(first, phy2log, 1), logcnt)


_MARGINS = (0.5, 1.0, 0.75, 1.5)
"""Shares of how far the loads of an expert rose above the middle."""


_FEW = 128
"""Replicas."""


def counts_over_windows(
    load: Float[Array, "L E"], above: Float[Array, "L E"], num_replicas: int, most: int | None
) -> Int32[Array, "L k E"]:
    """Counts to choose from by packing them over windows.

    The greedy ones for a share of what every expert rose `above` the middle: a replica that is
    late costs more than one that idles. Small layers have the time to try several shares.
    """
    margins = _MARGINS if num_replicas <= _FEW else _MARGINS[:1]
    counts = [replicate(load + unfused(k * above), num_replicas, most).logcnt for k in margins]
    return jnp.stack(counts, axis=1)
