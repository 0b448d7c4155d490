"""A trace replayed: every plan is made from past windows and measured on the following ones.

H is the number of past windows that a plan is made from, P the number of plans. Everything here
runs on the host and cannot be traced.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from eplb_jax.checks import LOAD_AXES, LoadLike, as_count, as_load
from eplb_jax.evaluation.metrics import balance_of, gpu_loads, gpu_loads_in_order
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.history import (
    RECENT,
    REMEMBERED,
    History,
    init_history,
    update_history,
)
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.planning.plan import plan
from eplb_jax.planning.policy import Policy
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_jax.transition.moves import moves
from eplb_jax.types import Placement, Topology, check_topology

_Plan = TypeVar("_Plan")
Planner = Callable[[np.ndarray, Placement | None], Placement]
"""A function of the past windows [H, L, E], oldest first, and the plan in place: the next plan."""


class Replay(NamedTuple):
    """How balanced the GPUs were in every window after the first H, and what it cost.

    By a cost, loads of GPUs are times.

    Attributes:
        load: Load of every layer, in the unit of the trace.
        gpu_load: Load of every GPU / mean of its layer; ones for a layer without load.
        imbalance: Max / mean GPU load - 1; zero for a layer without load.
        slowest: Load of the most loaded GPU, in the unit of the trace; its time, by a cost.
        moves: Slots that receive an expert from another GPU, for every plan that replaces one.
        seconds: Time to make every plan, without compilation.
        compile_seconds: Extra time of the first calls, which compile.
    """

    load: Float[np.ndarray, "T-H L"]
    gpu_load: Float[np.ndarray, "T-H L G"]
    imbalance: Float[np.ndarray, "T-H L"]
    slowest: Float[np.ndarray, "T-H L"]
    moves: Int[np.ndarray, "changes L"]
    seconds: Float[np.ndarray, " P"]
    compile_seconds: float

    @property
    def time_lost(self) -> float:
        """The mean of the imbalance over layers and windows, weighted by load.

        That is the time of the slowest GPUs over the time of perfect balance, minus 1, if time is
        proportional to load. 0 without load.
        """
        total = self.load.sum()
        return float((self.imbalance * self.load).sum() / total) if total else 0.0

    @property
    def mean_imbalance(self) -> float:
        """The plain mean of the imbalance over layers and windows with load; 0 without load."""
        busy = self.imbalance[self.load > 0]
        return float(busy.mean()) if busy.size else 0.0


def replay(
    trace: LoadLike,
    planner: Planner,
    topology: Topology,
    *,
    window: int = 8,
    every: int = 1,
    all_past: bool = False,
    previous: Placement | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
    on_window: Callable[[], object] | None = None,
) -> Replay:
    """Balance, moves and planning time of a planner that only sees the past of a trace.

    Besides planning, a plan of 58 layers of 288
    slots takes about 10 ms on a CPU core, most of it to count moves.

    Args:
        trace: Loads in any unit, [T, L, E], oldest window first.
        planner: Called with ``trace[t - window : t]`` and the plan in place, at first `previous`,
            for t = window, window + every and so on. The first two calls are made twice, as they
            may compile.
        topology: GPUs and slots of the plans.
        window: H, the number of past windows that a plan is made from, and that are not measured.
        every: Number of windows that a plan stays in place.
        all_past: Whether the planner is called with ``trace[:t]`` instead, all windows so far.
        previous: The plan in place at first. None: there is none, and the first
            plan counts no moves.
        split: "flexible": replicas share every window as by `runtime.split_load`. None: equally.
        cost: What tokens and active experts cost: GPUs are measured by time. None: by tokens.
        on_window: Called after every measured window.

    Returns:
        GPU loads, imbalance, moves and seconds.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The trace is not [T, L, E] or has no window after the first H, a load is
            NaN, infinite or negative, a count is less than 1, or a plan is invalid or does not
            fit the topology.

    Example:
        >>> trace = [[[4, 1, 1, 2]], [[4, 2, 1, 1]], [[4, 1, 2, 1]]]
        >>> topology = Topology(2, slots=2)
        >>> result = replay(trace, plan_from_last_window(topology), topology, window=1)
        >>> result.imbalance.tolist(), result.moves.tolist()
        ([[0.25], [0.25]], [[2]])
    """
    check_topology(topology)
    loads, window = _as_trace(trace, window)
    every = as_count("every", every)
    placed, gpu_load, moved, seconds, compile_seconds = previous, [], [], [], 0.0
    for t in range(window, len(loads), every):
        make = partial(planner, loads[0 if all_past else t - window : t], placed)
        new, took, compiled = time_plan(make, compiles=len(seconds) < 2)
        seconds.append(took)
        compile_seconds += compiled
        part = loads[t : t + every]
        gpu_load.append(gpu_loads(part, new, topology, split=split, cost=cost))
        if placed is not None:
            moved.append(np.sum(moves(placed, new, topology).received, axis=1))
        placed = new
        if on_window is not None:
            for _ in gpu_load[-1]:
                on_window()
    counts = np.asarray(moved, np.int64).reshape(-1, loads.shape[1])
    return _measure(
        loads[window:], np.concatenate(gpu_load), counts, np.asarray(seconds), compile_seconds
    )


def without_balancer(
    trace: LoadLike, topology: Topology, *, window: int = 8, cost: Cost | None = None
) -> Replay:
    """The same windows with experts in order and no replicas: no plans, no moves.

    Arguments and errors are those of `replay`; only the GPUs of the topology are used.

    Example:
        >>> trace = [[[4, 1, 1, 2]]] * 2
        >>> without_balancer(trace, Topology(2, slots=2), window=1).imbalance.tolist()
        [[0.25]]
    """
    check_topology(topology)
    loads, window = _as_trace(trace, window)
    gpu_load = gpu_loads_in_order(loads[window:], topology.num_gpus, cost)
    return _measure(loads[window:], gpu_load, np.zeros((0, loads.shape[1]), np.int64), np.zeros(0))


def plan_from_windows(
    topology: Topology,
    *,
    keep: bool = True,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    tolerance: float | None = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
) -> Planner:
    """A planner that uses all past windows, by `eplb_jax.plan`, whose arguments these are.

    With `keep` the plan in place is passed as `previous`, which `tolerance` and the limits on moves
    are about.
    """
    options: dict[str, Any] = {"policy": policy, "strategy": strategy}
    options |= {"split": split, "cost": cost}
    return _planner(topology, keep, tolerance, max_moves, move_penalty, **options)


def _planner(
    topology: Topology,
    keep: bool = True,
    tolerance: float | None = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    **options: Any,
) -> Callable[[np.ndarray | History, Placement | None], Placement]:
    limits = {"max_moves": max_moves, "move_penalty": move_penalty}
    for name, value in limits.items():
        if value is not None and not keep:
            raise ValueError(f"{name}={value} needs keep=True; nearest: {name}=None")
    options["strategy"] = resolve_strategy(options.get("strategy", "auto"))
    make = partial(plan, topology=topology, **options)

    def planner(past: np.ndarray | History, placed: Placement | None) -> Placement:
        if placed is None or not keep:
            return make(past)
        return make(past, previous=placed, tolerance=tolerance, **limits)

    return planner


def plan_from_history(
    topology: Topology, *, recent: int = RECENT, remembered: int = REMEMBERED, **options: Any
) -> Planner:
    """A planner that remembers: an `eplb_jax.History` is kept from call to call, as in a service.

    For replays with ``all_past=True``: every window that was not there in the last call is added
    to the history. One planner serves one replay; with fewer windows than before it starts anew.

    Args:
        topology: GPUs and slots of the plans.
        recent: Windows that are kept as they are.
        remembered: Groups of older windows.
        **options: As of `plan_from_windows`.
    """
    make = _planner(topology, **options)
    history: History | None = None
    seen = 0

    def planner(past: np.ndarray, placed: Placement | None) -> Placement:
        nonlocal history, seen
        if history is None or len(past) < seen:
            history, seen = init_history(*past.shape[1:], recent=recent, remembered=remembered), 0
        for window in past[seen:]:
            history = update_history(history, jnp.asarray(window, jnp.float32))
        seen = len(past)
        return make(history, placed)

    return planner


def plan_from_last_window(
    topology: Topology, *, policy: Policy = "auto", strategy: str | Strategy = "greedy"
) -> Planner:
    """A planner that uses the last window alone and ignores the plan in place, as DeepSeek's EPLB.

    The arguments are those of `eplb_jax.plan`.
    """
    make = partial(plan, topology=topology, policy=policy, strategy=resolve_strategy(strategy))
    return lambda past, placed: make(past[-1])


def time_plan(make: Callable[[], _Plan], *, compiles: bool = True) -> tuple[_Plan, float, float]:
    """A plan, the seconds that it took, and the seconds of compilation, which may be zero.

    A call that compiles is made twice: compilation is what the first one took longer.
    """
    start = perf_counter()
    placement = jax.block_until_ready(make())
    seconds = perf_counter() - start
    if not compiles:
        return placement, seconds, 0.0
    placement, again, _ = time_plan(make, compiles=False)
    return placement, again, max(seconds - again, 0.0)


def _as_trace(trace: LoadLike, window: int) -> tuple[Float[np.ndarray, "T L E"], int]:
    as_load(trace, "trace", least_axes=len(LOAD_AXES))
    loads, window = np.asarray(trace, np.float64), as_count("window", window)
    if len(loads) < 2:
        raise ValueError("trace has 1 window; planning from the past needs at least 2")
    if window >= len(loads):
        most = len(loads) - 1
        raise ValueError(
            f"window={window} leaves nothing to measure in {len(loads)} windows; nearest: {most}"
        )
    return loads, window


def _measure(
    loads: np.ndarray,
    gpu_load: np.ndarray,
    counts: np.ndarray,
    seconds: np.ndarray,
    compile_seconds: float = 0.0,
) -> Replay:
    mean = gpu_load.mean(axis=-1, keepdims=True)
    relative = np.divide(gpu_load, mean, out=np.ones_like(gpu_load), where=mean > 0)
    imbalance = np.asarray(balance_of(jnp.asarray(gpu_load, jnp.float32)).imbalance, np.float64)
    slowest = np.asarray(gpu_load.max(axis=-1), np.float64)
    return Replay(loads.sum(axis=2), relative, imbalance, slowest, counts, seconds, compile_seconds)
