"""A plan from loads alone: groups to nodes, replica counts in every node, replicas to its GPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import LOAD_BITS, along, fixed_point, normalise, ordered_sum
from eplb_jax.checks import fixed_if_none
from eplb_jax.packing.duplicates import count_duplicates
from eplb_jax.packing.objectives import best
from eplb_jax.packing.search import packs, score_windows
from eplb_jax.planning.forecast import Forecast, forecast_of
from eplb_jax.planning.history import History
from eplb_jax.planning.placement import count_replicas
from eplb_jax.planning.replication import counts_over_windows, list_replicas, replicate
from eplb_jax.planning.strategies import Strategy
from eplb_jax.sharding import by_layers
from eplb_jax.types import Replication, Topology


@by_layers
@partial(jax.jit, static_argnames=("topology", "strategy"))
def fresh_plan(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    key: Key[Array, ""] | None,
    empty: Int32[Array, "L N"] | None = None,
    *,
    topology: Topology,
    strategy: Strategy,
) -> Replication:
    """A plan from loads alone; hierarchical where the topology has several nodes.

    With `empty`, so many slots of every node hold -1, less than one a GPU, on distinct GPUs.
    """
    num_nodes = topology.num_nodes
    forecast = forecast_of(load, weights, summed=not strategy.distinct)
    num_experts = forecast.load.shape[1]
    group_key, gpu_key = jax.random.split(fixed_if_none(key))

    counts = topology.num_replicas // num_nodes, topology.gpus_per_node
    holes = None if empty is None else empty.reshape(-1)
    if num_nodes == 1:
        replicas = _place_in_node(forecast, *counts, strategy, gpu_key, holes)
        return replicas if empty is None else _without_empty(replicas)
    experts = experts_of_nodes(forecast, topology, strategy, group_key)
    # From here a row is a node of a layer, and its experts are numbered as in `experts`.
    of_node = forecast.map(lambda x: take_experts(jnp.repeat(x, num_nodes, axis=0), experts))
    replicas = _place_in_node(of_node, *counts, strategy, gpu_key, holes)
    if empty is not None:
        experts = jnp.pad(experts, ((0, 0), (0, 1)), constant_values=-1)
    phy2log = along(experts, replicas.phy2log, 1).reshape(-1, topology.num_replicas)
    rank = replicas.rank.reshape(-1, topology.num_replicas)
    return Replication(phy2log, rank, count_replicas(phy2log, num_experts))


def experts_of_nodes(
    forecast: Forecast, topology: Topology, strategy: Strategy, key: Key[Array, ""]
) -> Int32[Array, "rows n"]:
    """The experts of every node, [L * N, E / N]: whole groups, packed for balanced nodes."""
    num_layers, num_experts = forecast.load.shape
    num_nodes, num_groups = topology.num_nodes, topology.num_groups
    size = num_experts // num_groups
    by_group = forecast.map(lambda x: ordered_sum(x.reshape(*x.shape[:-1], num_groups, size), -1))
    groups = packs(by_group.load, num_nodes, strategy, key, windows=by_group.windows)
    first = groups.reshape(num_layers * num_nodes, num_groups // num_nodes, 1) * size
    experts = first + jnp.arange(size, dtype=jnp.int32)[None, None]
    return experts.reshape(num_layers * num_nodes, num_experts // num_nodes)


def take_experts(x: Float[Array, "L *T E"], index: Int32[Array, "L n"]) -> Float[Array, "L *T n"]:
    """``x[..., index]``, layer by layer."""
    return along(x, index[:, None] if x.ndim == 3 else index, -1)


def _place_in_node(
    forecast: Forecast,
    num_replicas: int,
    num_gpus: int,
    strategy: Strategy,
    key: Key[Array, ""],
    empty: Int32[Array, " L"] | None,
) -> Replication:
    """Experts replicated and packed to the GPUs of one node; L counts the nodes of all layers.

    Empty slots are the replicas of one more expert, without load.
    """
    num_experts = forecast.load.shape[1]
    # More replicas than GPUs would put an expert twice on one and serve it no better.
    most = num_gpus if num_replicas <= num_experts * num_gpus else None
    if empty is not None:
        forecast = forecast.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]))
    elif not strategy.distinct:
        replication = replicate(forecast.load, num_replicas)
        return pack_replicas(forecast, replication, num_gpus, strategy, key)
    load = forecast.load
    if forecast.above is not None:
        counts = counts_over_windows(load, forecast.above, num_replicas, num_gpus, most, empty)
    elif strategy.counts is not None:
        counts = strategy.counts.candidates(load, num_replicas, num_gpus, most, empty)
    else:
        counts = replicate(load, num_replicas, most, empty=empty).logcnt[:, None]
    choices = counts.shape[1]
    repeated = forecast.map(lambda x: jnp.repeat(x, choices, axis=0))
    replication = list_replicas(counts.reshape(-1, counts.shape[2]), num_replicas)
    holds_empty = empty is not None
    replicas = pack_replicas(repeated, replication, num_gpus, strategy, key, empty=holds_empty)
    if choices > 1:
        replicas = _best(replicas, forecast.fitted, counts, num_gpus)
    idle = jnp.all(load == 0, axis=1, keepdims=True)
    without_load = _replicas_without_load(num_experts, num_replicas, num_gpus)
    if empty is not None:
        without_load = _with_empty(without_load, empty, num_gpus)
    return jax.tree.map(lambda x, y: jnp.where(idle, x, y), without_load, replicas)


def pack_replicas(
    forecast: Forecast,
    replication: Replication,
    num_gpus: int,
    strategy: Strategy,
    key: Key[Array, ""],
    *,
    empty: bool = False,
) -> Replication:
    """These replicas in the slots of GPUs; with `empty`, the last expert stands for empty slots."""
    expert, rank, logcnt = replication
    num_experts, num_replicas = logcnt.shape[1], expert.shape[1]
    count = (jnp.maximum(logcnt, 1) if empty else logcnt).astype(jnp.float32)
    weight = forecast.map(
        lambda x: take_experts(x / (count[:, None] if x.ndim == 3 else count), expert)
    )
    labels = expert + num_experts * (rank // num_gpus) if strategy.distinct or empty else None
    spares = num_replicas - num_experts + empty
    slots = packs(weight.load, num_gpus, strategy, key, labels, spares, weight.windows)
    slots = slots.reshape(expert.shape)
    return Replication(along(expert, slots, 1), along(rank, slots, 1), logcnt)


def _best(
    replicas: Replication,
    windows: Float[Array, "L T E"],
    counts: Int32[Array, "L k E"],
    num_gpus: int,
) -> Replication:
    """Of the choices of every layer that with the fewest duplicates, then the least maximum load.

    The maximum load is summed over windows.
    """
    num_layers, choices, _ = counts.shape
    size = replicas.phy2log.shape[1] // num_gpus
    on_gpu = replicas.phy2log.reshape(num_layers, choices, num_gpus, size)
    windows = normalise(windows, (-2, -1))

    def scores(on_gpu: Array, count: Array, windows: Array) -> tuple[Array, Array]:
        count = jnp.maximum(count, 1).astype(jnp.float32)
        per_replica = fixed_point(windows / count[None], size, LOAD_BITS)
        one, each = on_gpu[..., None], per_replica[..., None]  # one packing is one lane
        (largest,) = score_windows(lambda loads: (jnp.max(loads, axis=0),), each, one)
        return count_duplicates(on_gpu), largest[0]

    each = jax.vmap(jax.vmap(scores, (0, 0, None)))(on_gpu, counts, windows)
    choice = jax.vmap(lambda *scores: best(scores, 1)[0])(*each)[:, None, None]

    def choose(x: Int32[Array, "_ n"]) -> Int32[Array, "L n"]:
        # Layer by layer, so that layers on several devices are not gathered.
        return along(x.reshape(num_layers, choices, x.shape[1]), choice, 1)[:, 0]

    return jax.tree.map(choose, replicas)


def _replicas_without_load(num_experts: int, num_replicas: int, num_gpus: int) -> Replication:
    """The placement of a layer without load, as one row.

    Experts are assigned to the GPUs in turn, then the spares, each to an expert with the fewest
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


def _with_empty(replicas: Replication, empty: Int32[Array, " L"], num_gpus: int) -> Replication:
    """Layers without load with so many empty slots, in place of the replicas assigned last."""
    size, num_experts = replicas.phy2log.shape[1] // num_gpus, replicas.logcnt.shape[1]
    number = np.arange(num_gpus)[:, None] + num_gpus * np.arange(size)[None]
    number = jnp.asarray(number.reshape(1, -1), jnp.int32) - (num_gpus * size - empty[:, None])
    expert = jnp.where(number < 0, replicas.phy2log, num_experts)
    rank = jnp.where(number < 0, replicas.rank, number)
    return Replication(expert, rank, count_replicas(expert, num_experts + 1))


def _without_empty(replicas: Replication) -> Replication:
    """-1 in place of the last expert, which stood for empty slots."""
    last = replicas.logcnt.shape[1] - 1
    expert = jnp.where(replicas.phy2log == last, -1, replicas.phy2log)
    return Replication(expert, replicas.rank, replicas.logcnt[:, :-1])
