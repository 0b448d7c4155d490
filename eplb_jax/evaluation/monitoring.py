"""Numbers of a running service for every window and every plan, as a dict and for Prometheus.

===================================  =======  =====================================================
name                                 type     definition
===================================  =======  =====================================================
eplb_balancedness_measured           gauge    mean / max GPU load, mean over layers; last window
eplb_worst_layer_imbalance           gauge    max / mean GPU load - 1 of the least balanced layer
eplb_worst_layer                     gauge    number of that layer; -1 without load
eplb_plan_age_windows                gauge    windows since the plan was put in place
eplb_balancedness_predicted          gauge    as measured, of the load that the plan was made from
eplb_planning_seconds                gauge    seconds that the last plan took to make
eplb_plans                           counter  plans put in place
eplb_moves                           counter  slots that took an expert from another GPU
eplb_moved_bytes                     counter  the bytes of these
===================================  =======  =====================================================

Layers without load are in no mean. The predicted balancedness overstates what follows, as the plan
fits the windows that it was made from: 0.93 and then 0.88 for gpt-oss-20b on 8 GPUs of 5 slots.

A dict has the counts of one plan; Prometheus adds them up, as `eplb_moves_total`. There is no label
for layers, GPUs or experts.

Example:
    >>> import eplb_jax, prometheus_client
    >>> exporter = Exporter(prometheus_client.CollectorRegistry())
    >>> load, old, new, topology = [[4, 4, 1, 1]], [[0, 1, 2, 3]], [[0, 2, 1, 3]], Topology(2, 2)
    >>> exporter.update(window_metrics(load, old, topology, age=1))  # after each window
    >>> moves = eplb_jax.moves(old, new, topology)
    >>> exporter.update(plan_metrics(load, new, topology, moves=moves))  # after each plan
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_amount, as_count
from eplb_jax.evaluation.metrics import balance
from eplb_jax.planning.history import History
from eplb_jax.transition.moves import Moves
from eplb_jax.types import Placement, Topology

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Metric(NamedTuple):
    """The type of a metric and its help text, which has the definition."""

    kind: Literal["gauge", "counter"]
    help: str


METRICS = {
    "eplb_balancedness_measured": Metric(
        "gauge",
        "Mean / max GPU load in the last window, mean over layers with load: 1 is perfect balance, "
        "and 1 - this the share of time lost to waiting.",
    ),
    "eplb_worst_layer_imbalance": Metric(
        "gauge",
        "Max / mean GPU load - 1 of the least balanced layer in the last window: 0 is perfect.",
    ),
    "eplb_worst_layer": Metric(
        "gauge",
        "Number of the least balanced layer in the last window, from 0; -1 without load.",
    ),
    "eplb_plan_age_windows": Metric("gauge", "Number of windows since the plan was put in place."),
    "eplb_balancedness_predicted": Metric(
        "gauge",
        "Mean / max GPU load of the plan in place under the load that it was made from, mean over "
        "its windows and layers with load. To compare with eplb_balancedness_measured.",
    ),
    "eplb_planning_seconds": Metric("gauge", "Seconds that it took to make the last plan."),
    "eplb_plans": Metric("counter", "Number of plans put in place."),
    "eplb_moves": Metric(
        "counter",
        "Number of slots that received an expert from another GPU or from storage, over layers.",
    ),
    "eplb_moved_bytes": Metric("counter", "Bytes of the experts that these slots received."),
}
"""The metrics by name, in the order of the table above."""


def window_metrics(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    age: int | Array | None = None,
    speed: ArrayLike | Array | None = None,
) -> dict[str, float]:
    """The metrics of a window, by name. Runs on the host and cannot be traced.

    Args:
        load: Tokens of the window, [L, E]. Of several, [T, L, E], the means are over all of them.
        placement: The plan that was in place, or its phy2log.
        topology: GPUs and slots, or the number of GPUs.
        age: Number of windows since that was put in place, as `BalancerState.age`; None: unknown,
            and not in the result.
        speed: Of every GPU, as of `metrics.balance`.

    Returns:
        Balancedness, the worst layer and its imbalance, and the age.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `metrics.balance`, or the age is negative.

    Example:
        >>> window_metrics([[100, 100], [0, 200]], [[0, 1], [0, 1]], 2)
        {'eplb_balancedness_measured': 0.75, 'eplb_worst_layer_imbalance': 1.0,
         'eplb_worst_layer': 1.0}
    """
    result = balance(load, placement, topology, speed=speed)
    imbalance = np.atleast_1d(result.imbalance)
    busy = bool(np.any(result.gpu_load))
    values = {
        "eplb_balancedness_measured": float(result.mean_balancedness),
        "eplb_worst_layer_imbalance": float(imbalance.max(initial=0)),
        "eplb_worst_layer": float(imbalance.argmax() % imbalance.shape[-1]) if busy else -1.0,
    }
    if age is not None:
        values["eplb_plan_age_windows"] = float(as_count("age", age, least=0))
    return values


def plan_metrics(
    load: LoadLike | History,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    moves: Moves | None = None,
    bytes_per_expert: int | None = None,
    seconds: float | None = None,
    speed: ArrayLike | Array | None = None,
) -> dict[str, float]:
    """The metrics of a plan that is put in place, by name. Runs on the host.

    Args:
        load: What it was made from, [L, E], [T, L, E], or a history: then its recent windows.
        placement: The plan, or its phy2log.
        topology: GPUs and slots, or the number of GPUs.
        moves: What led to it from the plan before, as of `eplb_jax.moves`; None: nothing moved, as
            with the first plan.
        bytes_per_expert: Size of the parameters of one expert of one layer; None: unknown, and no
            bytes in the result.
        seconds: Time it took to make the plan; None: unknown, and not in the result.
        speed: Of every GPU, as of `metrics.balance`.

    Returns:
        Predicted balancedness, an age of 0, one plan, its moves, their bytes, and seconds.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `metrics.balance`, or a number is negative or not finite.

    Example:
        >>> import eplb_jax
        >>> old, new, load = [[0, 1, 2, 3]], [[0, 2, 1, 3]], [[4, 4, 1, 1]]
        >>> moves = eplb_jax.moves(old, new, 2)
        >>> plan_metrics(load, new, 2, moves=moves, bytes_per_expert=1000)
        {'eplb_balancedness_predicted': 1.0, 'eplb_plan_age_windows': 0.0, 'eplb_plans': 1.0,
         'eplb_moves': 2.0, 'eplb_moved_bytes': 2000.0}
    """
    windows = load.recent if isinstance(load, History) else load
    predicted = balance(windows, placement, topology, speed=speed).mean_balancedness
    moved = 0 if moves is None else int(np.asarray(moves.received).sum())
    values = {
        "eplb_balancedness_predicted": float(predicted),
        "eplb_plan_age_windows": 0.0,
        "eplb_plans": 1.0,
        "eplb_moves": float(moved),
    }
    if bytes_per_expert is not None:
        values["eplb_moved_bytes"] = float(moved * as_count("bytes_per_expert", bytes_per_expert))
    if seconds is not None:
        values["eplb_planning_seconds"] = as_amount("seconds", seconds)
    return values


class Exporter:
    """Metrics in a registry of `prometheus_client`, which the extra `metrics` installs.

    One exporter serves a registry, and one process should export: counters of several add up. For
    several models or phases, name labels and give their values with every update. Gauges that have
    no value yet are NaN, or absent with labels.

    Example:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> registry = CollectorRegistry()
        >>> exporter = Exporter(registry, labels=["phase"])
        >>> values = window_metrics([[100, 300]], [[0, 1]], 2)
        >>> exporter.update(values, phase="decode")
        >>> registry.get_sample_value("eplb_worst_layer_imbalance", {"phase": "decode"})
        0.5
    """

    def __init__(self, registry: "CollectorRegistry", labels: Sequence[str] = ()) -> None:
        """Register all of `METRICS`, or none.

        Args:
            registry: Where; for instance `prometheus_client.REGISTRY`.
            labels: Names of labels that every update gives.

        Raises:
            ImportError: prometheus_client is not installed.
            ValueError: The registry has one of the metrics, or a label has an invalid name.
        """
        try:
            from prometheus_client import Counter, Gauge
        except ImportError as error:
            raise ImportError(
                "Exporter needs prometheus_client; install it with: pip install 'eplb-jax[metrics]'"
            ) from error
        made: dict[str, Any] = {}
        for name, (kind, text) in METRICS.items():
            if kind == "gauge":
                # Where processes share files, the last value, not one for each process.
                made[name] = Gauge(
                    name, text, labels, registry=None, multiprocess_mode="mostrecent"
                )
            else:
                made[name] = Counter(name, text, labels, registry=None)
        registered = []
        try:
            for metric in made.values():
                registry.register(metric)
                registered.append(metric)
        except ValueError as error:
            for metric in registered:
                registry.unregister(metric)
            raise ValueError(
                f"registry has metrics of these names: {error}; use one exporter for all, with "
                "labels"
            ) from error
        self._metrics, self._labels = made, tuple(labels)
        if not labels:
            for name, (kind, _) in METRICS.items():
                if kind == "gauge":
                    made[name].set(float("nan"))  # not 0, which would be a balancedness

    def update(self, values: Mapping[str, float], **labels: str) -> None:
        """Set gauges, and add to counters.

        Args:
            values: As of `window_metrics` and `plan_metrics`.
            **labels: A value for each name given at the start.

        Raises:
            ValueError: A name is not one of `METRICS`, or the labels are others than those named.
        """
        for name in values:
            if name not in METRICS:
                raise ValueError(f"{name} is not a metric; choose from: {', '.join(METRICS)}")
        if set(labels) != set(self._labels):
            wanted = ", ".join(self._labels) or "none"
            raise ValueError(f"labels must be {wanted}, got {', '.join(labels) or 'none'}")
        for name, value in values.items():
            metric = self._metrics[name].labels(**labels) if labels else self._metrics[name]
            if METRICS[name].kind == "gauge":
                metric.set(value)
            else:
                metric.inc(value)
