"""One node: how many replicas every expert gets, and on which GPU they lie."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import along, normalise_windows
from eplb_jax.packing.duplicates import repeats_in
from eplb_jax.packing.objectives import best
from eplb_jax.packing.search import added_up, packs
from eplb_jax.planning.forecast import Forecast
from eplb_jax.planning.replication import counts_over_windows, listed, replicate
from eplb_jax.planning.strategies import Strategy
from eplb_jax.types import Replication


def take(x: Float[Array, "L *T E"], index: Int32[Array, "L n"]) -> Float[Array, "L *T n"]:
    """``x[..., index]``, layer by layer."""
    if x.ndim == 3:
        index = index[:, None]
    return along(x, index, -1)


def place_in_node(
    forecast: Forecast,
    num_replicas: int,
    num_gpus: int,
    strategy: Strategy,
    key: Key[Array, ""],
) -> Replication:
    """Replicate experts and pack the replicas to GPUs; nodes do not see each other."""
    load = forecast.load
    num_experts = load.shape[1]
    if not strategy.distinct:
        return _packed(forecast, replicate(load, num_replicas), num_gpus, strategy, key)
    # More replicas than GPUs would put an expert twice on one and serve it no better.
    most = num_gpus if num_replicas <= num_experts * num_gpus else None
    if forecast.above is not None:
        counts = counts_over_windows(load, forecast.above, num_replicas, most)
    elif strategy.counts is not None:
        counts = strategy.counts.candidates(load, num_replicas, num_gpus, most)
    else:
        counts = replicate(load, num_replicas, most).logcnt[:, None]
    choices = counts.shape[1]
    repeated = forecast.map(lambda x: jnp.repeat(x, choices, axis=0))
    replication = listed(counts.reshape(len(load) * choices, num_experts), num_replicas)
    replicas = _packed(repeated, replication, num_gpus, strategy, key)
    if choices > 1:
        seen = load if forecast.windows is None else forecast.windows
        replicas = _best(replicas, seen, counts, num_gpus)
    idle = jnp.all(load == 0, axis=1, keepdims=True)
    at_rest = _idle_replicas(num_experts, num_replicas, num_gpus)
    return jax.tree.map(lambda x, y: jnp.where(idle, x, y), at_rest, replicas)


def _packed(
    forecast: Forecast,
    replication: Replication,
    num_gpus: int,
    strategy: Strategy,
    key: Key[Array, ""],
) -> Replication:
    """These replicas on GPUs."""
    expert, rank, logcnt = replication
    num_experts, num_replicas = logcnt.shape[1], expert.shape[1]
    per_replica = forecast.map(lambda x: x / _like(x, logcnt.astype(jnp.float32)))
    weight = per_replica.map(lambda x: take(x, expert))
    labels = expert + num_experts * (rank // num_gpus) if strategy.distinct else None
    spares = num_replicas - num_experts
    slots = packs(weight.load, num_gpus, strategy, key, labels, spares, weight.windows)
    slots = slots.reshape(expert.shape)
    return Replication(along(expert, slots, 1), along(rank, slots, 1), logcnt)


def _like(x: Float[Array, "L *T E"], counts: Float[Array, "L E"]) -> Float[Array, "L *_ E"]:
    return counts[:, None] if x.ndim == 3 else counts


def _best(
    replicas: Replication,
    seen: Float[Array, "L *T E"],
    counts: Int32[Array, "L k E"],
    num_gpus: int,
) -> Replication:
    """Of the choices for every layer that with fewest repeats, then with the lightest heaviest GPU.

    That is added up over windows.
    """
    num_layers, choices, _ = counts.shape
    num_slots = replicas.phy2log.shape[1]
    on_gpu = replicas.phy2log.reshape(num_layers, choices, num_gpus, num_slots // num_gpus)
    windows = normalise_windows(seen if seen.ndim == 3 else seen[:, None])

    def scores(on_gpu: Array, count: Array, windows: Array) -> tuple[Array, Array]:
        per_replica = windows / count.astype(jnp.float32)
        one, each = on_gpu[..., None], per_replica[..., None]  # one packing is one lane
        (heaviest,) = added_up(lambda loads: (jnp.max(loads, axis=0),), each, one)
        return repeats_in(on_gpu), heaviest[0]

    each = jax.vmap(jax.vmap(scores, (0, 0, None)))(on_gpu, counts, windows)
    choice = jax.vmap(lambda *scores: best(scores, 1)[0])(*each)[:, None, None]

    def chosen(x: Int32[Array, "_ n"]) -> Int32[Array, "L n"]:
        # Layer by layer, lest layers on several devices be merge_windows.
        return along(x.reshape(num_layers, choices, x.shape[1]), choice, 1)[:, 0]

    return jax.tree.map(chosen, replicas)


def _idle_replicas(num_experts: int, num_replicas: int, num_gpus: int) -> Replication:
    """Those of a node without load, one row.

    Experts are dealt to the GPUs in turn, then the spares, each to an expert with the fewest
    replicas that its GPU does not hold.
    """
    count = np.zeros(num_experts, np.int32)
    held = np.zeros((num_gpus, num_experts), bool)
    expert, rank = np.zeros((2, num_gpus, num_replicas // num_gpus), np.int32)
    for replica in range(num_replicas):
        turn, gpu = divmod(replica, num_gpus)
        one = replica if replica < num_experts else np.argmin(count + held[gpu] * num_replicas)
        expert[gpu, turn], rank[gpu, turn] = one, count[one]
        count[one] += 1
        held[gpu, one] = True
    return Replication(*(jnp.asarray(x.reshape(1, -1)) for x in (expert, rank, count)))
