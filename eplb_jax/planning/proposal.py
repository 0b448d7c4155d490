"""What a balancer proposes: the next plan, and what it is worth."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.planning.by_time import time_of_plan
from eplb_jax.planning.cost import Cost, curve_of
from eplb_jax.planning.forecast import forecast_of, tokens_of_a_window
from eplb_jax.planning.history import History
from eplb_jax.planning.placement import count_replicas
from eplb_jax.transition.local_search import plan_cost
from eplb_jax.transition.moves import Moves, moves
from eplb_jax.types import Placement, Topology

VERDICTS = ("no load", "near enough", "better", "lost experts")
"""Why a layer keeps its plan (the first two) or changes it; `Proposal.verdict` has the numbers."""

_NO_LOAD, _NEAR_ENOUGH, _BETTER, _LOST = range(4)


class Proposal(NamedTuple):
    """The next plan and what it is worth. Times are those of the most loaded GPU of a layer.

    Attributes:
        plan: The next plan.
        moves: What leads to it from the plan in place.
        time_in_place: Predicted time of every layer in the next window with the plan in place, in
            tokens of a GPU of speed 1, or in the unit of the cost.
        time: The same with the next plan.
        order: Layers by descending gain per moved expert: the first k are the ones to move first.
        verdict: Why every layer changes or not: a number of `VERDICTS`.
    """

    plan: Placement
    moves: Moves
    time_in_place: Float[Array, " L"]
    time: Float[Array, " L"]
    order: Int32[Array, " L"]
    verdict: Int32[Array, " L"]

    def reasons(self) -> list[str]:
        """The verdicts in words."""
        return [VERDICTS[i] for i in np.asarray(self.verdict)]


def assess(
    history: History,
    in_place: Placement,
    new: Placement,
    active: Bool[Array, " G"] | None,
    speed: Float[Array, " G"] | None,
    *,
    topology: Topology,
    cost: Cost | None = None,
) -> Proposal:
    """The proposal of a plan."""
    windows = forecast_of(history, summed=False).fitted
    old = in_place.phy2log
    if active is not None:
        old = jnp.where(active[jnp.asarray(topology.gpu_of_slot)][None], old, -1)
        speed = jnp.where(active, 1.0 if speed is None else speed, 0)
    plans = old, new.phy2log
    steps = moves(old, new, topology, active=active)
    recent = history.recent
    seen = jnp.sum(jnp.sum(recent, axis=2) > 0, axis=0).astype(jnp.float32)
    tokens = jnp.sum(recent, axis=(0, 2)) / jnp.maximum(seen, 1)
    if cost is None:
        capacity = topology.num_gpus if speed is None else jnp.sum(speed)
        imbalance = (plan_cost(windows, x, old, topology=topology, speed=speed)[0] for x in plans)
        before, after = (tokens / capacity * (1 + x) for x in imbalance)
    else:
        curve = curve_of(cost, cost.tokens_per_step or tokens_of_a_window(history))
        steps_of_window = tokens / curve.tokens_per_step
        before, after = (
            steps_of_window * time_of_plan(windows, x, curve, topology.num_gpus) for x in plans
        )
    lost = jnp.any(count_replicas(old, in_place.logcnt.shape[1]) == 0, axis=1)
    before = jnp.where(lost, jnp.inf, before)
    moved = jnp.sum(steps.received, axis=1).astype(jnp.float32)
    changed = jnp.any(old != new.phy2log, axis=1)
    rate = jnp.where(changed, (before - after) / jnp.maximum(moved, 1), -jnp.inf)
    verdict = jnp.where(
        changed,
        jnp.where(lost, _LOST, _BETTER),
        jnp.where(tokens > 0, _NEAR_ENOUGH, _NO_LOAD),
    ).astype(jnp.int32)
    order = jnp.argsort(-rate, stable=True).astype(jnp.int32)
    return Proposal(new, steps, before, after, order, verdict)
