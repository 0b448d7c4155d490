"""The options of `plan`: their checks, and which kind of plan they ask for."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Key
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_key, is_concrete
from eplb_jax.planning.by_time import plan_by_time
from eplb_jax.planning.cost import Cost, curve_of
from eplb_jax.planning.forecast import as_weights, layers_and_experts, tokens_of_a_window
from eplb_jax.planning.gpus import Gpus, align, as_active, as_speed
from eplb_jax.planning.history import History
from eplb_jax.planning.next_plan import TOLERANCE, as_limits, elastic_plan, flexible_plan, next_plan
from eplb_jax.planning.per_node import fresh_plan
from eplb_jax.planning.placement import as_placement
from eplb_jax.planning.policy import Policy, is_hierarchical
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_jax.transition.relabel import relabel
from eplb_jax.types import Placement, Replication, Topology, check_topology


def plan_checked(
    load: Array | np.ndarray | History,
    topology: Topology,
    name: str,
    *,
    weights: LoadLike | Literal["equal"] | None = None,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    previous_gpus: Sequence[int] | None = None,
    active: ArrayLike | Array | None = None,
    speed: ArrayLike | Array | None = None,
    tolerance: float | None = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
) -> Replication:
    """The plan of loads that are checked already, called `name` in errors."""
    num_layers, num_experts = layers_and_experts(load)
    check_topology(topology)
    hierarchical = is_hierarchical(topology, policy, num_experts)
    seen, chosen = (load, as_weights(weights, load)), resolve_strategy(strategy)
    gpus = Gpus(as_active(active, topology, num_experts), as_speed(speed, topology))
    options = {"topology": topology, "hierarchical": hierarchical, "strategy": chosen}
    if previous is None:
        given = {"max_moves": max_moves, "move_penalty": move_penalty}
        for limit, value in (given | {"previous_gpus": previous_gpus}).items():
            if value is not None:
                raise ValueError(f"{limit} needs previous, the plan in place, got None")
    elif tolerance is None and (max_moves is not None or move_penalty is not None):
        raise ValueError("tolerance=None, a new plan, takes no limits; nearest: tolerance=0")
    limits = as_limits(tolerance, max_moves, move_penalty)
    elastic = not topology.is_uniform or any(x is not None for x in gpus)
    if cost is not None and not cost.is_proportional:
        if elastic or split is not None or (max_moves, move_penalty) != (None, None):
            raise ValueError(
                "cost needs equal GPUs that are all alive, and takes no split, max_moves or "
                "move_penalty; nearest: without these"
            )
        old = None
        if previous is not None:
            old = align(previous, topology, num_layers, num_experts, previous_gpus)
        curve = curve_of(cost, cost.tokens_per_step or tokens_of_a_window(load))
        keeps = None if tolerance is None else limits.tolerance
        return plan_by_time(*seen, as_key(key), old, curve, keeps, **options)
    if previous is not None and not elastic:
        moved = previous_gpus is not None
        elastic = not _holds_all(previous, topology.num_replicas, num_experts, moved)
    if split is not None:
        if split != "flexible":
            raise ValueError(f'split={split!r} is not known; nearest: split="flexible"')
        if elastic or move_penalty is not None:
            raise ValueError(
                'split="flexible" needs equal GPUs that are all alive, a whole plan in place, and '
                "takes no move_penalty"
            )
    if elastic:
        old = None
        if previous is not None:
            old = align(previous, topology, num_layers, num_experts, previous_gpus)
        return elastic_plan(*seen, old, gpus, limits, **options)
    search = topology if hierarchical else topology.one_node
    fresh = partial(fresh_plan, *seen, as_key(key), topology=search, strategy=chosen)
    if previous is None:
        if split is not None:
            return flexible_plan(*seen, as_key(key), None, limits, **options)
        return fresh()
    old = as_placement(previous, "previous", num_experts)
    wanted = num_layers, topology.num_replicas
    if old.phy2log.shape != wanted or old.logcnt.shape[-1] != num_experts:
        raise ValueError(
            f"previous must have the shape [layers, slots] = {wanted} and {num_experts} experts, "
            f"got {old.phy2log.shape} and {old.logcnt.shape[-1]} beside {name}"
        )
    if split is not None:
        return flexible_plan(*seen, as_key(key), old, limits, **options)
    if tolerance is None:
        nodes = {"topology": topology, "hierarchical": hierarchical}
        return relabel(fresh(), old.phy2log, **nodes)
    return next_plan(*seen, as_key(key), old, limits, **options)


def _holds_all(
    previous: Placement | LoadLike, num_slots: int, num_experts: int, moved: bool
) -> bool:
    """Whether the plan in place is for these GPUs: a slot for every expert, none without one."""
    slots = getattr(previous, "phy2log", previous)
    if moved or np.ndim(slots) != 2 or np.shape(slots)[1] != num_slots:
        return not moved and np.ndim(slots) != 2  # whose error comes later
    if isinstance(slots, jax.Array) and not is_concrete(slots):
        return True
    experts = np.asarray(slots)
    if experts.dtype.kind not in "iu" or np.any(experts >= num_experts):
        return True
    held = np.zeros((len(experts), num_experts + 1), bool)  # the last one counts -1
    held[np.arange(len(experts))[:, None], experts] = True
    return bool(held[:, :-1].all() and not held[:, -1].any())
