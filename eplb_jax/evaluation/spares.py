"""What spare slots are worth: imbalance against the number of slots."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from eplb_jax.checks import LoadLike, as_count
from eplb_jax.evaluation.metrics import balance
from eplb_jax.planning.history import History
from eplb_jax.planning.plan import plan_replicas
from eplb_jax.types import Topology, check_topology


class Spares(NamedTuple):
    """A number of slots, and the imbalance that it leaves.

    Attributes:
        slots_per_gpu: Slots of a GPU.
        imbalance: Max / mean GPU load - 1, mean over layers and windows with load.
    """

    slots_per_gpu: int
    imbalance: float


def spares_curve(
    load: LoadLike | History,
    judged: LoadLike,
    topology: Topology,
    slots: Sequence[int],
    *,
    split: Literal["flexible"] | None = None,
) -> tuple[Spares, ...]:
    """The imbalance of new plans with other numbers of slots, to set against their memory.

    Runs on the host; every number of slots compiles a plan.

    Args:
        load: What plans are made from, as of `plan`.
        judged: Windows to judge by, [T, L, E] or [L, E], which plans should not be made from.
        topology: GPUs, nodes and groups; its slots do not matter.
        slots: Slots of a GPU to try; at least E / G, rounded up.
        split: "flexible": plans and windows of a flexible split. None: of equal shares.

    Returns:
        A point for each number of slots, in this order.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `plan` and `metrics.balance`.

    Example:
        >>> seen, judged = [[8, 1, 1, 2]], [[9, 1, 1, 1]]
        >>> curve = spares_curve(seen, judged, Topology(2, slots=2), [2, 3])
        >>> [(x.slots_per_gpu, round(x.imbalance, 2)) for x in curve]
        [(2, 0.67), (3, 0.0)]
    """
    check_topology(topology)
    points = []
    for count in slots:
        other = replace(topology, slots=as_count("slots", count))
        phy2log = plan_replicas(load, other, split=split).phy2log
        imbalance = balance(judged, phy2log, other, split=split).mean_imbalance
        points.append(Spares(int(count), float(imbalance)))
    return tuple(points)
