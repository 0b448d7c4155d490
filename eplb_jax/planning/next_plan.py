"""The next plan beside the one in place, and plans for GPUs that differ or are not all alive.

The plan in place is the start: a layer keeps it as long as a new plan would hardly be better, and
otherwise gets the nearest plan that is nearly as good as a new one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import unfused
from eplb_jax.checks import as_limit, as_penalty
from eplb_jax.packing.duplicates import count_duplicates
from eplb_jax.planning.forecast import forecast_of
from eplb_jax.planning.gpus import Gpus
from eplb_jax.planning.history import History
from eplb_jax.planning.per_node import fresh_plan
from eplb_jax.planning.placement import count_replicas, ranks_in, ranks_listed
from eplb_jax.planning.strategies import Strategy
from eplb_jax.sharding import by_layers
from eplb_jax.splitting.search import search
from eplb_jax.transition.completion import complete_plan
from eplb_jax.transition.local_search import Goal, improve_plan, plan_cost
from eplb_jax.transition.relabel import relabel
from eplb_jax.types import Placement, Replication, Topology

TOLERANCE = 0.125
"""Default of how much worse than a new plan the next one may be."""

ALWAYS = 0.01
"""Imbalance that a plan may have above a new one's, in units of the tolerance, whatever that is."""

_FEW_SLOTS = 12
"""Slots of a GPU up to which two are swapped for two: with more, single swaps are fine enough."""

_ROUNDS_FROM_NOTHING = 64
"""Maximum number of rounds for a plan that starts from nothing."""


class Limits(NamedTuple):
    """Limits on the way from the plan in place, as of `plan`."""

    tolerance: Float[Array, ""]
    max_moves: Int32[Array, ""]
    move_penalty: Float[Array, ""]


def as_limits(
    tolerance: Any, max_moves: Any, move_penalty: Any, default: Limits | None = None
) -> Limits:
    """Limits as arrays; None stands for the default, or for none.

    Raises:
        TypeError: One is no number.
        ValueError: One is negative or not finite.
    """
    zero = jnp.zeros((), jnp.float32)
    none = Limits(zero, jnp.asarray(np.iinfo(np.int32).max, jnp.int32), zero)
    given = none if default is None else default
    return Limits(
        given.tolerance if tolerance is None else as_penalty("tolerance", tolerance),
        given.max_moves if max_moves is None else as_limit("max_moves", max_moves),
        given.move_penalty if move_penalty is None else as_penalty("move_penalty", move_penalty),
    )


def _goal(reached: Float[Array, " L"], limits: Limits) -> Goal:
    """The imbalance that is near enough to what a new plan reaches."""
    target = reached + unfused(limits.tolerance * (ALWAYS + reached))
    return Goal(target, jnp.broadcast_to(limits.max_moves, target.shape), limits.move_penalty)


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical", "strategy"))
def next_plan(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    key: Key[Array, ""] | None,
    old: Placement,
    limits: Limits,
    *,
    topology: Topology,
    hierarchical: bool,
    strategy: Strategy,
) -> Replication:
    """The plan in place, improved until it is nearly as good as a new one.

    Where no plan near it is within twice the tolerance, the new one replaces it, renumbered, within
    the same limits; and where the old one has duplicates that are still there.
    """
    forecast = forecast_of(load, weights, summed=not strategy.distinct)
    windows, nodes = forecast.fitted, {"topology": topology, "hierarchical": hierarchical}
    search = topology if hierarchical else topology.one_node
    new = fresh_plan(load, weights, key, topology=search, strategy=strategy)
    reached, _ = plan_cost(windows, new.phy2log, old.phy2log, topology=topology)
    goal = _goal(reached, limits)
    expert, cost, _ = improve_plan(windows, old.phy2log, old.phy2log, goal, **nodes)

    far = cost > goal.target + (goal.target - reached)
    busy = jnp.any(forecast.load > 0, axis=1)
    duplicates = jax.vmap(lambda x: count_duplicates(x.reshape(topology.num_gpus, -1)))
    doubled = busy & (duplicates(expert) > duplicates(new.phy2log))

    def replace(expert: Int32[Array, "L R"]) -> Int32[Array, "L R"]:
        fresh = relabel(new, old.phy2log, **nodes).phy2log
        imbalance, moves = plan_cost(windows, fresh, old.phy2log, topology=topology)
        price = jnp.maximum(imbalance, goal.target) + unfused(
            limits.move_penalty * moves.astype(jnp.float32)
        )
        # A plan without duplicates is worth an imbalance of 1.
        better = (moves <= limits.max_moves) & (far | doubled)
        better &= price < cost + doubled.astype(jnp.float32)
        return jnp.where(better[:, None], fresh, expert)

    # A new plan moves more than an eighth of the slots: with less to spend it is not looked at.
    possible = limits.max_moves >= topology.num_replicas // 8
    expert = lax.cond(possible & jnp.any(far | doubled), replace, lambda x: x, expert)
    same = jnp.all(expert == old.phy2log, axis=1, keepdims=True)
    rank = jnp.where(same, ranks_listed(old), ranks_in(expert))
    return Replication(expert, rank, count_replicas(expert, forecast.load.shape[1]))


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical", "strategy"))
def elastic_plan(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    old: Int32[Array, "L R"] | None,
    gpus: Gpus,
    limits: Limits,
    *,
    topology: Topology,
    hierarchical: bool,
    strategy: Strategy,
) -> Replication:
    """A plan for live GPUs, with slots and speeds of their own; -1 in the slots of the others.

    Experts without a slot in the plan in place come first and count as moves, as do those that
    fill empty slots; both are made whatever the limit. Then as `next_plan`, but a new plan, made
    by the same search from nothing, only says what can be reached.
    """
    forecast = forecast_of(load, weights, summed=not strategy.distinct)
    windows, num_experts = forecast.fitted, forecast.load.shape[1]
    takes = jnp.asarray(np.array(topology.slots_of_gpu) > 0)
    live = takes if gpus.active is None else takes & gpus.active
    speed = gpus.speed
    if speed is not None or gpus.active is not None or not bool(np.all(topology.slots_of_gpu)):
        speed = jnp.where(live, 1.0 if speed is None else speed, 0)
    nodes: dict[str, Any] = {"topology": topology, "hierarchical": hierarchical, "speed": speed}
    empty = jnp.full((len(forecast.load), topology.num_replicas), -1, jnp.int32)
    expected = forecast.load if forecast.above is None else forecast.load + forecast.above
    start = complete_plan(expected, empty, live, **nodes)
    zero = jnp.zeros((), jnp.float32)
    every = jnp.full(len(start), np.iinfo(np.int32).max, jnp.int32)
    floor = Goal(jnp.broadcast_to(zero, every.shape), every, zero)
    few = max(topology.slots_of_gpu) <= _FEW_SLOTS
    search = {"rounds": _ROUNDS_FROM_NOTHING, "two": len(windows[0]) == 1 and few} | nodes
    new, _, _ = improve_plan(windows, start, start, floor, **search)
    if old is not None:
        lives = live[jnp.asarray(topology.gpu_of_slot)]
        held = jnp.where(lives, old, -1)
        reached, _ = plan_cost(windows, new, held, topology=topology, speed=speed)
        start = complete_plan(expected, held, live, **nodes)
        _, least = plan_cost(windows, start, held, topology=topology, speed=speed)
        goal = _goal(reached, limits)
        goal = goal._replace(max_moves=jnp.maximum(goal.max_moves, least))
        new, _, _ = improve_plan(windows, start, held, goal, **nodes)
    return Replication(new, ranks_in(new), count_replicas(new, num_experts))


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical", "strategy"))
def flexible_plan(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    key: Key[Array, ""] | None,
    old: Placement | None,
    limits: Limits,
    *,
    topology: Topology,
    hierarchical: bool,
    strategy: Strategy,
) -> Replication:
    """A plan for a flexible split: from the plan in place, or from one for an equal split."""
    forecast = forecast_of(load, weights, summed=not strategy.distinct)
    search_in = topology if hierarchical else topology.one_node
    if old is None:
        fresh = fresh_plan(load, weights, key, topology=search_in, strategy=strategy)
        start, slack, most = fresh.phy2log, jnp.zeros((), jnp.float32), as_limits(None, None, None)
    else:
        start, slack, most = old.phy2log, limits.tolerance * ALWAYS, limits
    node = tuple(topology.node_of_gpu.tolist()) if hierarchical else None
    options = {"num_gpus": topology.num_gpus, "node": node}
    expert = search(forecast.fitted, start, slack, most.max_moves, **options)
    if old is None:
        rank = ranks_in(expert)
    else:
        same = jnp.all(expert == old.phy2log, axis=1, keepdims=True)
        rank = jnp.where(same, ranks_listed(old), ranks_in(expert))
    return Replication(expert, rank, count_replicas(expert, forecast.load.shape[1]))
