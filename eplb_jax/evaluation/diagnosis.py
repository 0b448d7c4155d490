"""What a trace says about the plan in place and about the next one: the numbers of a report.

The windows are split: the new plan is made from the first ones and judged on the last ones, which
it has not seen. Everything here runs on the host and cannot be traced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from eplb_jax.checks import LOAD_AXES, LoadLike, as_load
from eplb_jax.evaluation.decision import Decision, decide
from eplb_jax.evaluation.replay import (
    Replay,
    plan_from_history,
    plan_from_last_window,
    replay,
    without_balancer,
)
from eplb_jax.evaluation.spares import Spares, spares_curve
from eplb_jax.planning.history import RECENT, init_history, update_history
from eplb_jax.planning.placement import placement_of
from eplb_jax.planning.plan import plan
from eplb_jax.planning.policy import resolve_policy
from eplb_jax.transition.moves import Moves, moves
from eplb_jax.types import Placement, Topology, check_experts

NO_BALANCER, KEPT, MEMORY, LAST_WINDOW, DEEPSEEK = (
    "no balancer",
    "plan in place, kept",
    "balancer with memory",
    "balancer, last window only",
    "DeepSeek's EPLB",
)
"""Names of the replays."""

MAX_PLANS = 20
"""Maximum number of plans of a replay: with more windows, a plan stays in place for several."""

_HOTTEST = 10
_FOREVER = 1e30  # windows


@dataclass(frozen=True)
class Costs:
    """What a move costs and what balance saves, as of `decide`; None: not known.

    Attributes:
        bytes_per_expert: Size of the parameters of one expert of one layer.
        seconds_per_token: Time of one token of one expert on a GPU.
        bandwidth: Bytes per second that a GPU sends, and receives.
        serves: Number of windows that the new plan stays in place.
    """

    bytes_per_expert: int | None = None
    seconds_per_token: float | None = None
    bandwidth: float = 50e9
    serves: float = 100


class Hot(NamedTuple):
    """An expert with much load in the windows to judge by.

    Attributes:
        layer: Its layer, from 0.
        expert: Its number in the layer.
        share: Its share of the load of the layer, mean over windows with load.
        before: Its replicas in the plan in place.
        after: Its replicas in the new plan.
    """

    layer: int
    expert: int
    share: float
    before: int
    after: int


class Diagnosis(NamedTuple):
    """The numbers of a report. Windows to judge by are those from `seen` on.

    Attributes:
        shape: Windows, layers and experts of the trace.
        topology: GPUs, slots and nodes of both plans.
        seen: Number of windows that the new plan is made from.
        given: Whether there was a plan in place; otherwise experts are in order, without replicas.
        old: The plan in place.
        new: The new plan.
        before: The windows to judge by with the plan in place.
        after: The same windows with the new plan.
        moves: What leads from the old plan to the new one, on the host.
        costs: What was known of the costs.
        known: Whether time is known, so that `decision` weighs gain against cost in seconds.
            Otherwise the unit of its gain is tokens of the most loaded GPUs, a move is one byte,
            and moving is worth any gain that is not chance.
        decision: What `decide` says on the windows to judge by.
        replays: The trace replayed, by name.
        window: First window of the replays.
        every: Number of windows that a plan stays in place in the replays.
        hottest: The experts with the largest shares of the load of their layers.
        spares: Imbalance against the number of slots, ascending.
    """

    shape: tuple[int, int, int]
    topology: Topology
    seen: int
    given: bool
    old: Placement
    new: Placement
    before: Replay
    after: Replay
    moves: Moves
    costs: Costs
    known: bool
    decision: Decision
    replays: Mapping[str, Replay]
    window: int
    every: int
    hottest: tuple[Hot, ...]
    spares: tuple[Spares, ...]

    @property
    def saved(self) -> float:
        """The share of the time of experts that the new plan saves, if time is that of tokens."""
        before, after = ((x.load * (1 + x.imbalance)).sum() for x in (self.before, self.after))
        return float(1 - after / before) if before else 0.0

    @property
    def in_turn(self) -> int:
        """Experts that are moved one after another: per layer the most that one GPU moves."""
        return int(np.maximum(self.moves.sent, self.moves.received).max(axis=1).sum())


def diagnose(
    trace: LoadLike,
    topology: Topology,
    phy2log: LoadLike | None = None,
    *,
    costs: Costs | None = None,
) -> Diagnosis:
    """The numbers of a report on a plan in place, and on the plan that would follow it.

    The last quarter of the windows judges the plan that is made from the others. The replays plan
    from the windows before each one, at most `MAX_PLANS` times.

    Args:
        trace: Tokens in every window, [T, L, E], oldest first; at least 2 windows.
        topology: GPUs, slots and nodes of the plan; GPUs with equally many slots.
        phy2log: The plan in place, [L, R]. None: experts in order, without replicas.
        costs: What moves cost and balance saves. None: not known.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The trace is not [T, L, E] of at least 2 windows, a load is NaN, infinite or
            negative, or trace, plan and topology do not fit.

    Example:
        >>> from eplb_jax.evaluation import loads
        >>> load = loads.example("gpt_oss_20b")[:4, :2]
        >>> result = diagnose(load, Topology(4, slots=9))  # doctest: +SKIP
        >>> result.seen, result.decision.action  # doctest: +SKIP
        (3, 'undecided')
    """
    as_load(trace, "trace", least_axes=len(LOAD_AXES))
    load, costs = np.asarray(trace, np.float64), costs or Costs()
    num_windows, num_layers, num_experts = load.shape
    if num_windows < 2:
        raise ValueError("trace has 1 window; a report needs one to plan from and one to judge by")
    check_experts(topology, num_experts)
    _ = topology.slots_per_gpu  # raises where GPUs differ
    given = phy2log is not None
    if phy2log is None:
        phy2log = np.tile(in_order(num_experts, topology), (num_layers, 1))
    old = placement_of(phy2log, num_experts)
    wanted = num_layers, topology.num_replicas
    if old.phy2log.shape != wanted:
        raise ValueError(
            f"phy2log, the plan in place, has the shape {old.phy2log.shape}; "
            f"[layers, slots] of the trace and the topology is {wanted}"
        )
    start = old if given else placement_of(_filled(phy2log, num_experts), num_experts)
    seen = num_windows - max(1, num_windows // 4)
    history = init_history(num_layers, num_experts)
    for window in load[:seen]:
        history = update_history(history, window)
    new = plan(history, topology, previous=start)
    keep = partial(replay, load, topology=topology, window=seen, every=num_windows)
    steps = jax.device_get(moves(old, new, topology))
    judged = load[seen:]
    known, decision = _decide(judged, old, new, topology, costs)
    window = min(RECENT, num_windows // 2)
    every = -(-(num_windows - window) // MAX_PLANS)
    return Diagnosis(
        load.shape,
        topology,
        seen,
        given,
        old,
        new,
        keep(lambda *_: old),
        keep(lambda *_: new),
        steps,
        costs,
        known,
        decision,
        _replays(load, topology, start, window, every, kept=given),
        window,
        every,
        _hottest(judged, old, new),
        spares_curve(history, judged, topology, _slots_to_try(num_experts, topology)),
    )


def in_order(num_experts: int, topology: Topology) -> Int[np.ndarray, " R"]:
    """The slots of a layer without a balancer: expert e on GPU e * G // E, -1 in spare slots.

    Example:
        >>> in_order(5, Topology(2, slots=4)).tolist()
        [0, 1, 2, -1, 3, 4, -1, -1]
    """
    slots = np.full((topology.num_gpus, topology.slots_per_gpu), -1, np.int32)
    gpu = np.arange(num_experts) * topology.num_gpus // num_experts
    rank = np.arange(num_experts) - np.searchsorted(gpu, gpu)
    slots[gpu, rank] = np.arange(num_experts)
    return slots.reshape(-1)


def _filled(phy2log: LoadLike, num_experts: int) -> Int[np.ndarray, "L R"]:
    """Experts in all slots: the search for a new plan starts from them, and nothing else."""
    slots = np.array(phy2log)
    empty = slots < 0
    spare = np.cumsum(empty, axis=1) - 1
    count = np.maximum(empty.sum(axis=1, keepdims=True), 1)
    expert = (spare * num_experts // count + num_experts // 2) % num_experts
    return np.where(empty, expert, slots)


def _decide(
    judged: Float[np.ndarray, "T L E"],
    old: Placement,
    new: Placement,
    topology: Topology,
    costs: Costs,
) -> tuple[bool, Decision]:
    """Whether time is known, and the decision; without costs, on the gain in tokens alone."""
    size, token = costs.bytes_per_expert, costs.seconds_per_token
    known = size is not None and token is not None
    if size is None or token is None:
        size, token, costs = 1, 1.0, Costs(bandwidth=1.0, serves=_FOREVER)
    decision = decide(
        judged,
        old,
        new,
        topology,
        bytes_per_expert=size,
        bandwidth=costs.bandwidth,
        serves=costs.serves,
        seconds_per_token=token,
    )
    return known, decision


def _replays(
    load: Float[np.ndarray, "T L E"],
    topology: Topology,
    start: Placement,
    window: int,
    every: int,
    *,
    kept: bool,
) -> dict[str, Replay]:
    """The windows from the one of that number on, under every way to plan."""

    def last_only(past: np.ndarray, placed: Placement | None) -> Placement:
        history = update_history(init_history(*past.shape[1:]), past[-1])
        return plan(history, topology, previous=placed)

    options = {"previous": start, "window": window, "all_past": True}
    results = {NO_BALANCER: without_balancer(load, topology, window=window)}
    if kept:
        results[KEPT] = replay(load, lambda *_: start, topology, every=len(load), **options)
    for name, planner in (
        (MEMORY, plan_from_history(topology)),
        (LAST_WINDOW, last_only),
        (DEEPSEEK, plan_from_last_window(topology)),
    ):
        results[name] = replay(load, planner, topology, every=every, **options)
    return results


def _hottest(judged: Float[np.ndarray, "T L E"], old: Placement, new: Placement) -> tuple[Hot, ...]:
    total = judged.sum(axis=2, keepdims=True)
    share = np.divide(judged, total, out=np.zeros_like(judged), where=total > 0)
    mean = share.sum(axis=0) / np.maximum((total > 0).sum(axis=0), 1)
    order = np.argsort(-mean, axis=None, kind="stable")[:_HOTTEST]
    counts = [np.asarray(x.logcnt) for x in (old, new)]
    return tuple(
        Hot(
            int(layer),
            int(expert),
            float(mean[layer, expert]),
            *(int(x[layer, expert]) for x in counts),
        )
        for layer, expert in zip(*np.unravel_index(order, mean.shape), strict=True)
        if mean[layer, expert] > 0
    )


def _slots_to_try(num_experts: int, topology: Topology) -> list[int]:
    """No spare slots, some, and twice as many as now."""
    least = -(-num_experts // topology.num_gpus)
    now = topology.slots_per_gpu - least
    policy = resolve_policy("auto", topology.num_groups, topology.num_nodes)
    nodes = topology.num_nodes if policy == "hierarchical" else 1
    most = max(num_experts // nodes, least + now)  # more slots than experts do nothing
    return [least + x for x in sorted({0, 1, 2, now, 2 * now}) if least + x <= most]
