"""A budget of slots over layers: every spare slot where it saves most time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eplb_jax.checks import LoadLike, as_count
from eplb_jax.evaluation.slots_curve import as_windows, slots_curve
from eplb_jax.planning.cost import Cost
from eplb_jax.types import Topology, check_experts


class SlotBudget(NamedTuple):
    """The spare slots of every layer, and what they are chosen from.

    Attributes:
        spares: Spare slots of every layer, for `plan_layers`.
        time: Expected time of all layers with them: tokens of the most loaded GPUs, or in the unit
            of the cost. It is measured on the windows by which spares were chosen, so it is low by
            as much as the choice fits their noise.
        curve: Time of every layer with 0, 1, ... spare slots, as measured, float64.
    """

    spares: Int[np.ndarray, " L"]
    time: float
    curve: Float[np.ndarray, "L r"]


def spread_slots(
    load: LoadLike,
    judged: LoadLike | None,
    topology: Topology,
    total_spares: int,
    *,
    cost: Cost | None = None,
) -> SlotBudget:
    """The spare slots of every layer with the least time in total.

    The curves are those of `slots_curve`: plans from some windows, time on others. With
    `judged=None` the even windows of `load` are judged under plans from the odd ones, and the other
    way round; the curve is the mean of both, so every window is judged, and none by a plan that has
    seen it. Of an odd number of windows the oldest is left out. One window can only be judged by
    itself, which says nothing of what changes between windows.

    Of all ways to give at most `total_spares` slots, these have the least sum of the measured
    curves, exactly and for curves of any shape: least(l, c), the least time of the first l layers
    with c slots, is the minimum over k of least(l - 1, c - k) + curve(l, k), since the best choice
    for l layers that gives k slots to the last is a best one of c - k slots for the others. Of
    equally good ways it takes the fewest slots: those that gain nothing are not used. O(L C K) for
    C slots in total and K points of a curve.

    Curves have noise, which the choice fits, the more the fewer windows there are. With changing
    traffic it gained little over equal spares on measured traces (`benchmarks/README.md`).

    No choice breaks equal memory of GPUs: a layer's time does not depend on which GPUs are which,
    and `plan_layers` numbers them so that all hold the same total, or one less.

    Args:
        load: Tokens that plans are made from, [L, E] or [T, L, E].
        judged: Windows to judge by, [L, E] or [T, L, E]; None: those of `load`.
        topology: GPUs, and with their slots the most that a layer may use.
        total_spares: Spare slots of all layers and GPUs together: what memory is there for. A
            multiple of G is used in full.
        cost: What a replica costs; None: its tokens.

    Returns:
        Spares of every layer, their time, and the curves.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `slots_curve`, or there are fewer slots than experts, or total_spares is
            negative.

    Example:
        >>> load, topology = [[8, 1, 1, 2], [3, 3, 3, 3]], Topology(2, slots=3)
        >>> spread_slots(load, load, topology, 2).spares.tolist()
        [1, 0]

    References:
        CRAFT, 2026 (arXiv:2603.28768): replicas of layers as a multiple-choice knapsack by dynamic
        programming.
    """
    total = as_count("total_spares", total_spares, least=0)
    seen, _ = as_windows(load, load if judged is None else judged, topology)
    num_experts = seen.shape[2]
    check_experts(topology, num_experts)
    useful = num_experts * (topology.num_gpus - 1)
    most = min(topology.num_replicas - num_experts, useful, total)
    halves = [(seen, seen if judged is None else judged)]
    if judged is None and len(seen) > 1:
        seen = seen[len(seen) % 2 :]
        halves = [(seen[0::2], seen[1::2]), (seen[1::2], seen[0::2])]
    curves = [slots_curve(x, y, topology, most, cost=cost) for x, y in halves]
    curve = np.mean([np.asarray(x, np.float64) for x in curves], axis=0)
    spares = least_time(curve, total)
    return SlotBudget(spares, float(curve[np.arange(len(curve)), spares].sum()), curve)


def least_time(curve: Float[np.ndarray, "L K"], total: int) -> Int[np.ndarray, " L"]:
    """The slots of every layer with the least sum of times, at most `total`: see `spread_slots`."""
    num_layers, points = curve.shape
    total = min(total, num_layers * (points - 1))
    chosen = np.zeros((num_layers, total + 1), np.int32)
    least = np.zeros(total + 1)
    for layer, times in enumerate(curve):
        before, least = least, least + times[0]
        for k in range(1, min(points, total + 1)):
            time = before[: total + 1 - k] + times[k]
            better = time < least[k:]
            least[k:][better] = time[better]
            chosen[layer, k:][better] = k
    left = int(np.argmin(least))
    spares = np.zeros(num_layers, np.int32)
    for layer in reversed(range(num_layers)):
        spares[layer] = chosen[layer, left]
        left -= spares[layer]
    return spares
