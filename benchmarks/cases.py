"""What `speed.py` and `stages.py` measure: shapes, their loads, and calls timed in turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import eplb_jax

Calls = Mapping[str, Callable[[], Any]]


class Shape(NamedTuple):
    """What a plan is made for."""

    layers: int
    experts: int
    replicas: int
    gpus: int
    groups: int = 1
    nodes: int = 1
    policy: Literal["global", "hierarchical"] = "global"
    windows: int = 1

    def __str__(self) -> str:
        more = f", {self.groups} groups on {self.nodes} nodes" if self.nodes > 1 else ""
        more += f", {self.windows} windows" if self.windows > 1 else ""
        return f"{self.layers} x {self.experts} -> {self.replicas} / {self.gpus}{more}"


SHAPES = {
    "v3": Shape(58, 256, 288, 32),
    "v3-hierarchical": Shape(58, 256, 288, 32, 8, 4, "hierarchical"),
    "v3-windows": Shape(58, 256, 288, 32, windows=8),
    "94x128": Shape(94, 128, 144, 16),
    "60x384": Shape(60, 384, 416, 32),
    "v3-64": Shape(58, 256, 320, 64),
    "v3-144": Shape(58, 256, 288, 144),
    "1x256": Shape(1, 256, 288, 32),
    "512x256": Shape(512, 256, 288, 32),
    "58x1024": Shape(58, 1024, 1152, 64),
    "512x1024": Shape(512, 1024, 1152, 64),
}


def load_of(shape: Shape) -> np.ndarray:
    """The bundled load of DeepSeek-V3-0324 where it fits, else a drawn one; [L, E] or [T, L, E]."""
    rng = np.random.default_rng(0)
    size = shape.layers, shape.experts
    if shape.experts == 256:
        measured = eplb_jax.loads.example().sum(axis=0).astype(float)
        load = np.resize(measured, size)
        load[len(measured) :] *= rng.lognormal(sigma=0.1, size=size)[len(measured) :]
    else:
        load = 1e5 * rng.lognormal(size=size)
    if shape.windows > 1:
        load = load * rng.lognormal(sigma=0.2, size=(shape.windows, *size))
    return load.astype(np.float32)


def plan(weight: Any, shape: Shape, strategy: str | eplb_jax.Strategy) -> eplb_jax.Placement:
    counts = shape.replicas, shape.groups, shape.nodes, shape.gpus
    return eplb_jax.rebalance_experts(weight, *counts, policy=shape.policy, strategy=strategy)


class Timed(NamedTuple):
    """Seconds of the first call, median and least of later ones; what the first returned."""

    first: float
    steady: float
    least: float
    result: Any


def timed(calls: Calls, repeat: int) -> dict[str, Timed]:
    """All sides in turn in every round; the second call counts only where it is the last."""
    result: dict[str, Any] = {}

    def seconds(name: str) -> float:
        start = time.perf_counter()
        answer = jax.block_until_ready(calls[name]())
        spent = time.perf_counter() - start
        result.setdefault(name, answer)
        return spent

    names = list(calls)
    first = {name: seconds(name) for name in names}
    second = {name: seconds(name) for name in names}
    rounds = {x: repeat if t < 0.3 else min(repeat, 3) if t < 5 else 0 for x, t in second.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeat):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if i < rounds[name]:
                times[name].append(seconds(name))
    spent = {name: times[name] or [second[name]] for name in names}
    return {
        name: Timed(first[name], statistics.median(x), min(x), result[name])
        for name, x in spent.items()
    }
