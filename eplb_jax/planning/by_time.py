"""Plans that balance the time of GPUs instead of their tokens.

Another replica of an expert takes tokens from the others, but its weights must be read as well, and
its tokens are rounded up once more. So a plan may leave slots empty: several numbers of spares are
tried, each given to the replicas that take most time, packed, and judged by the time of the GPU
that takes most. An empty slot is an expert of its own, without load, until the plan is done.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import along, first_equal, ordered_sum, unfused
from eplb_jax.checks import fixed_if_none
from eplb_jax.planning.cost import Curve, time_of_replica
from eplb_jax.planning.forecast import Forecast, forecast_of
from eplb_jax.planning.history import History
from eplb_jax.planning.next_plan import ALWAYS
from eplb_jax.planning.per_node import experts_of_nodes, pack_replicas, take_experts
from eplb_jax.planning.placement import count_replicas, ranks_in
from eplb_jax.planning.replication import list_replicas
from eplb_jax.planning.strategies import Strategy
from eplb_jax.sharding import by_layers
from eplb_jax.transition.relabel import relabel
from eplb_jax.types import Replication, Topology

_FRACTIONS = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Fractions of the spare slots that are tried."""

_EXTRA_WORK = 0.25
"""Weight of time that spares add to all GPUs, beside that of the GPU that takes most: the latter is
flattered by the choice, the former is certain."""

_SPARES = 0.02
"""What all spares are worth as a fraction of the time of a GPU: they halve what is not foreseen."""


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical", "strategy"))
def plan_by_time(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    key: Key[Array, ""] | None,
    old: Int32[Array, "L R"] | None,
    curve: Curve,
    tolerance: Float[Array, ""] | None,
    *,
    topology: Topology,
    hierarchical: bool,
    strategy: Strategy,
) -> Replication:
    """A plan by the time of its replicas; -1 in slots that would cost more than they relieve.

    A layer keeps the plan in place where that is nearly as good, and otherwise gets the new one,
    renumbered. No tolerance: never kept.
    """
    windows = forecast_of(load, weights, summed=False).fitted
    num_experts = windows.shape[2]
    size, tokens = _tokens(windows, curve)
    single = unfused(time_of_replica(curve, tokens) * size)  # of experts without replicas
    group_key, gpu_key = jax.random.split(fixed_if_none(key))
    num_nodes = topology.num_nodes if hierarchical else 1
    counts = topology.num_replicas // num_nodes, topology.num_gpus // num_nodes
    place = partial(_place, curve=curve, strategy=strategy, key=gpu_key)
    if num_nodes == 1:
        expert = place(tokens, size, *counts)
    else:
        nodes = experts_of_nodes(_as_forecast(single), topology, strategy, group_key)
        tokens_of, size_of = (jnp.repeat(x, num_nodes, axis=0) for x in (tokens, size))
        found = place(take_experts(tokens_of, nodes), size_of, *counts)
        expert = jnp.where(found < 0, -1, along(nodes, jnp.maximum(found, 0), 1))
        expert = expert.reshape(-1, topology.num_replicas)
    if old is not None:
        nodes = {"topology": topology, "hierarchical": hierarchical}
        new = _numbered(expert, num_experts)
        held = jnp.where(old < 0, topology.num_replicas + num_experts, old)
        moved = relabel(new, held, **nodes).phy2log
        expert = jnp.where(moved < num_experts, moved, -1)
        if tolerance is not None:
            before, after = (
                _most(curve, tokens, size, x, topology.num_gpus) for x in (old, expert)
            )
            ideal = ordered_sum(ordered_sum(single, -1), -1) / topology.num_gpus
            slack = unfused(tolerance * (after - ideal + unfused(ALWAYS * ideal)))
            held_all = jnp.all(count_replicas(old, num_experts) > 0, axis=1)
            keeps = held_all & (before <= after + jnp.maximum(slack, 0))
            expert = jnp.where(keeps[:, None], old, expert)
    return Replication(expert, ranks_in(expert), count_replicas(expert, num_experts))


def _numbered(expert: Int32[Array, "L R"], num_experts: int) -> Replication:
    """Empty slots as experts of their own, which no GPU had before."""
    slot = jnp.arange(expert.shape[1], dtype=jnp.int32)
    expert = jnp.where(expert < 0, num_experts + slot[None], expert)
    count = count_replicas(expert, num_experts + slot.size)
    return Replication(expert, jnp.zeros_like(expert), count)


def _as_forecast(times: Float[Array, "L T E"]) -> Forecast:
    load = ordered_sum(times, 1)
    return Forecast(load) if times.shape[1] == 1 else Forecast(load, windows=times)


def _place(
    tokens: Float[Array, "L T E"],
    size: Float[Array, "L T 1"],
    num_replicas: int,
    num_gpus: int,
    *,
    curve: Curve,
    strategy: Strategy,
    key: Key[Array, ""],
) -> Int32[Array, "L R"]:
    """The experts in the slots of one node; L counts the nodes of all layers."""
    num_layers, _, num_experts = tokens.shape
    spares = num_replicas - num_experts
    used = sorted({round(spares * x) for x in _FRACTIONS})
    counts = _counts(tokens, size, curve, used, num_gpus)  # [L, K, E]
    choices = len(used)
    shares = tokens[:, None] / counts[:, :, None].astype(jnp.float32)
    times = unfused(time_of_replica(curve, shares) * size[:, None])  # of a replica, [L, K, T, E]
    times = times.reshape(-1, *tokens.shape[1:])
    counts = counts.reshape(-1, num_experts)
    whole = unfused(times * counts[:, None].astype(jnp.float32))
    empty = jnp.zeros((*times.shape[:2], spares), jnp.float32)
    filled = (
        jnp.arange(spares, dtype=jnp.int32)[None] < spares - jnp.array(used, jnp.int32)[:, None]
    )
    fillers = jnp.tile(filled.astype(jnp.int32), (num_layers, 1))
    replication = list_replicas(jnp.concatenate([counts, fillers], axis=1), num_replicas)
    forecast = _as_forecast(jnp.concatenate([whole, empty], axis=2))
    found = pack_replicas(forecast, replication, num_gpus, strategy, key).phy2log
    if choices > 1:
        most = _max_time(jnp.concatenate([times, empty], axis=2), found, num_gpus)
        most = most.reshape(num_layers, choices)
        work = ordered_sum(ordered_sum(whole, -1), -1).reshape(num_layers, choices) / num_gpus
        part = jnp.array(used, jnp.float32) / max(spares, 1)
        price = most + unfused(_EXTRA_WORK * (work - work[:, :1]))
        price = price - unfused(_SPARES * part[None] * work[:, :1])
        chosen = first_equal(price.T, jnp.min(price, axis=1))
        found = along(found.reshape(num_layers, choices, -1), chosen[:, None, None], 1)[:, 0]
    return jnp.where(found < num_experts, found, -1)


def _counts(
    tokens: Float[Array, "L T E"],
    size: Float[Array, "L T 1"],
    curve: Curve,
    used: list[int],
    most: int,
) -> Int32[Array, "L K E"]:
    """Counts of replicas for so many spares, each of which goes to the replica of most time."""
    expert = jnp.arange(tokens.shape[2], dtype=jnp.int32)

    def time(tokens: Float[Array, "L T *n"]) -> Float[Array, "L *n"]:
        return jnp.max(time_of_replica(curve, tokens) * size, axis=1)

    def give(
        state: tuple[Int32[Array, "L E"], Float[Array, "L E"]], _: None
    ) -> tuple[tuple[Array, Array], Int32[Array, " L"]]:
        count, value = state
        able = jnp.where(count < most, value, -1)
        chosen = first_equal(able.T, jnp.max(able, axis=1))
        here = expert[None] == chosen[:, None]
        count = count + here.astype(jnp.int32)
        mine = along(tokens, chosen[:, None, None], 2)
        mine = mine / along(count, chosen[:, None], 1)[:, None].astype(jnp.float32)
        return (count, jnp.where(here, time(mine), value)), chosen

    ones = jnp.ones((len(tokens), tokens.shape[2]), jnp.int32)
    chosen = lax.scan(give, (ones, time(tokens)), length=used[-1])[1]  # [spares, L]
    given = [jnp.sum(chosen[:n, :, None] == expert[None, None], axis=0) for n in used]
    return jnp.stack([ones + x.astype(jnp.int32) for x in given], axis=1)


def _max_time(
    times: Float[Array, "L T E"], phy2log: Int32[Array, "L R"], num_gpus: int
) -> Float[Array, " L"]:
    """The time of the GPU that takes most, summed over windows."""
    of_slot = along(times, phy2log[:, None], 2)
    of_gpu = ordered_sum(of_slot.reshape(*of_slot.shape[:2], num_gpus, -1), -1)
    return ordered_sum(jnp.max(of_gpu, axis=2), 1)


def time_of_plan(
    windows: Float[Array, "L T E"], phy2log: Int32[Array, "L R"], curve: Curve, num_gpus: int
) -> Float[Array, " L"]:
    """The time of the GPU that takes most in a step, mean over windows by their size."""
    size, tokens = _tokens(windows, curve)
    total = ordered_sum(size[..., 0], 1)
    return _most(curve, tokens, size, phy2log, num_gpus) / jnp.where(total > 0, total, 1)


def _tokens(
    windows: Float[Array, "L T E"], curve: Curve
) -> tuple[Float[Array, "L T 1"], Float[Array, "L T E"]]:
    """The size of windows, in their unit, and the tokens of experts in a step."""
    size = ordered_sum(windows, -1)[..., None]
    return size, windows / jnp.where(size > 0, size, 1) * curve.tokens_per_step


def _most(
    curve: Curve,
    tokens: Float[Array, "L T E"],
    size: Float[Array, "L T 1"],
    phy2log: Int32[Array, "L R"],
    num_gpus: int,
) -> Float[Array, " L"]:
    """`_max_time` of a plan, with -1 in empty slots."""
    num_experts = tokens.shape[2]
    count = jnp.maximum(count_replicas(phy2log, num_experts), 1).astype(jnp.float32)
    times = unfused(time_of_replica(curve, tokens / count[:, None]) * size)
    times = jnp.concatenate([times, jnp.zeros_like(times[:, :, :1])], axis=2)
    return _max_time(times, jnp.where(phy2log < 0, num_experts, phy2log), num_gpus)
