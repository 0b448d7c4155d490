"""A trace replayed: every plan is made from past windows and measured on those to come.

H is the number of past windows that a plan is made from, P the number of plans.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from eplb_jax.checks import LoadLike, as_count, as_load, check_divides
from eplb_jax.planning.plan import Policy, rebalance_experts
from eplb_jax.planning.strategies import Strategy
from eplb_jax.types import Placement

Plan = Callable[[np.ndarray, Placement | None], Placement]
"""From the past windows [H, L, E], oldest first, and the plan in place to the next plan."""


class Replay(NamedTuple):
    """How even the GPUs were in every window after the first H, and what that took.

    Attributes:
        gpu_load: Relative to the mean GPU of the layer; ones for a layer without load.
        imbalance: Heaviest GPU / mean GPU - 1; zero for a layer without load.
        moves: Slots that every plan but the first fetches from another GPU.
        seconds: What every plan took, compilation apart.
        compile_seconds: What the first calls took longer than the same calls again.
    """

    gpu_load: Float[np.ndarray, "T-H L G"]
    imbalance: Float[np.ndarray, "T-H L"]
    moves: Int[np.ndarray, "P-1 L"]
    seconds: Float[np.ndarray, " P"]
    compile_seconds: float


def replay(
    trace: LoadLike,
    plan: Plan,
    *,
    num_gpus: int,
    window: int = 8,
    every: int = 1,
    on_window: Callable[[], object] | None = None,
) -> Replay:
    """Plan from the last windows at every step, and measure each plan on windows it has not seen.

    An expert splits its load evenly over its replicas. Beside planning this takes about half a
    millisecond a window of 58 layers.

    Args:
        trace: [T, L, E] loads in any unit, oldest window first.
        plan: Called with ``trace[t - window : t]`` and the plan in place, None at first, for
            t = window, window + every and so on. The first two calls are made twice, as they
            may compile.
        num_gpus: G; divides the number of slots of the plans.
        window: H, past windows that a plan is made from.
        every: Windows that a plan stays in place for.
        on_window: Called after every measured window.

    Returns:
        GPU loads, imbalance, moves and seconds.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The trace is not [T, L, E] or has no window after the first H, a load is
            NaN, infinite or negative, a count is less than 1, or num_gpus does not divide the
            number of slots.

    Example:
        >>> trace = [[[4, 1, 1, 2]], [[4, 2, 1, 1]], [[4, 1, 2, 1]]]
        >>> result = replay(trace, last_window(4, 1, 1, 2), num_gpus=2, window=1)
        >>> result.imbalance.tolist(), result.moves.tolist()
        ([[0.25], [0.25]], [[2]])
    """
    loads, window = _checked(trace, window)
    num_gpus, every = as_count("num_gpus", num_gpus), as_count("every", every)
    placed, gpu_load, moved, seconds, compiling = None, [], [], [], 0.0
    for t in range(window, len(loads), every):
        make = partial(plan, loads[t - window : t], placed)
        new, took = timed(make)
        if len(seconds) < 2:
            first = took
            new, took = timed(make)
            compiling += max(first - took, 0.0)
        seconds.append(took)
        check_divides("num_gpus", num_gpus, "number of slots", new.phy2log.shape[1])
        if placed is not None:
            moved.append(_fetched(np.asarray(placed.phy2log), np.asarray(new.phy2log), num_gpus))
        placed = new
        phy2log, logcnt = np.asarray(new.phy2log), np.asarray(new.logcnt)
        for load in loads[t : t + every]:
            per_slot = np.take_along_axis(load / logcnt, phy2log, axis=1)
            gpu_load.append(per_slot.reshape(len(load), num_gpus, -1).sum(axis=2))
            if on_window is not None:
                on_window()
    moves = np.asarray(moved, np.int64).reshape(-1, loads.shape[1])
    return _measured(np.stack(gpu_load), moves, np.asarray(seconds), compiling)


def without_balancer(trace: LoadLike, *, num_gpus: int, window: int = 8) -> Replay:
    """The same windows with experts in order and no replicas: no plans, no moves.

    Arguments and errors are those of `replay`.

    Example:
        >>> without_balancer([[[4, 1, 1, 2]]] * 2, num_gpus=2, window=1).imbalance.tolist()
        [[0.25]]
    """
    loads, window = _checked(trace, window)
    none = np.zeros((0, loads.shape[1]), np.int64)
    return _measured(in_order(loads[window:], as_count("num_gpus", num_gpus)), none, np.zeros(0))


def in_order(load: Float[np.ndarray, "*T L E"], num_gpus: int) -> Float[np.ndarray, "*T L G"]:
    """GPU loads with expert e on GPU e * G // E: what a model does without a balancer.

    Example:
        >>> in_order(np.ones((1, 5)), 2).tolist()
        [[3.0, 2.0]]
    """
    gpu = np.arange(load.shape[-1]) * num_gpus // load.shape[-1]
    return np.stack([load[..., gpu == g].sum(axis=-1) for g in range(num_gpus)], axis=-1)


def plan_from_windows(
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    keep: bool = True,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    max_moves: int | None = None,
    price: float = 0.0,
) -> Plan:
    """A plan for all past windows: `eplb_jax.rebalance_experts`, whose arguments these are.

    With `keep` the plan in place is handed on as `previous`, which `max_moves` and `price` need.
    """
    if (max_moves is not None or price) and not keep:
        limit = f"price={price}" if max_moves is None else f"max_moves={max_moves}"
        raise ValueError(f"{limit} needs keep, as it limits what changes")
    counts = num_replicas, num_groups, num_nodes, num_gpus
    make = partial(rebalance_experts, policy=policy, strategy=strategy)

    def plan(past: np.ndarray, placed: Placement | None) -> Placement:
        if placed is None or not keep:
            return make(past, *counts)
        return make(past, *counts, previous=placed, max_moves=max_moves, price=price)

    return plan


def plan_from_last_window(
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "greedy",
) -> Plan:
    """A plan for the last window alone, whatever is in place: what DeepSeek's EPLB does."""
    counts = num_replicas, num_groups, num_nodes, num_gpus
    return lambda past, placed: rebalance_experts(
        past[-1], *counts, policy=policy, strategy=strategy
    )


def _checked(trace: LoadLike, window: int) -> tuple[np.ndarray, int]:
    as_load(trace, "trace", ("window", "layer", "expert"))
    loads, window = np.asarray(trace, np.float64), as_count("window", window)
    if len(loads) < 2:
        raise ValueError("trace has 1 window; planning from the past needs at least 2")
    if window >= len(loads):
        most = len(loads) - 1
        raise ValueError(
            f"window={window} leaves none of the {len(loads)} windows to measure; nearest: {most}"
        )
    return loads, window


def timed(make: Callable[[], Placement]) -> tuple[Placement, float]:
    """A plan, and the seconds until it was there."""
    start = time.perf_counter()
    placement = jax.block_until_ready(make())
    return placement, time.perf_counter() - start


def _fetched(
    old: Int[np.ndarray, "L R"], new: Int[np.ndarray, "L R"], num_gpus: int
) -> Int[np.ndarray, " L"]:
    """Slots whose expert their GPU did not hold; those of `moves` that come from another GPU."""
    layer = np.arange(len(old))[:, None]
    gpu = np.arange(old.shape[1]) * num_gpus // old.shape[1]
    held: Bool[np.ndarray, "L G E"] = np.zeros((len(old), num_gpus, old.max() + 1), bool)
    held[layer, gpu, old] = True
    return np.sum(~held[layer, gpu, new], axis=1)


def _measured(
    gpu_load: np.ndarray, moves: np.ndarray, seconds: np.ndarray, compile_seconds: float = 0.0
) -> Replay:
    mean = gpu_load.mean(axis=2, keepdims=True)
    relative = np.divide(gpu_load, mean, out=np.ones(gpu_load.shape), where=mean > 0)
    imbalance = np.maximum(relative.max(axis=2) - 1, 0)
    return Replay(relative, imbalance, moves, seconds, compile_seconds)
