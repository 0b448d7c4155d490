"""What a running service moves: plans that start from the one in place, and GPUs that come and go.

    pip install '.[cli]'
    python benchmarks/continuity.py          # four tables: three minutes
    python benchmarks/continuity.py --events 10000   # also random events, half an hour

Moved slots are those that receive an expert from another GPU, of the slots of a layer.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import Topology, plan, plan_from_history, replay

SERVICE = Topology(32, slots=9)
MEASURED = [
    ("gpt_oss_20b", False, 40, 8),
    ("gpt_oss_20b_decode", False, 40, 8),
    ("deepseek_v2_lite", False, 72, 8),
    ("deepseek_v2_lite", True, 72, 8),
    ("deepseek_v2_lite", True, 80, 16),
    ("deepseek_v2_lite", True, 80, 40),
]


def loads() -> dict[str, np.ndarray]:
    """A synthetic load and the measured one of DeepSeek-V3, [58, 256]."""
    synthetic = np.random.default_rng(0).lognormal(0, 1, (58, 256)) * 1000
    return {"lognormal": synthetic, "DeepSeek-V3": eplb_jax.loads.example().sum(axis=0)}


def moved(old: eplb_jax.Placement, new: eplb_jax.Placement, topology: Topology) -> float:
    return (
        float(np.mean(eplb_jax.moves(old, new, topology).received.sum(axis=1)))
        / old.phy2log.shape[1]
    )


def imbalance(load: np.ndarray, new: eplb_jax.Placement, topology: Topology) -> float:
    return float(eplb_jax.metrics.balance(load, new, topology).mean_imbalance)


def table_of_changes(console: Console) -> None:
    """Loads other than the plan's by noise of every expert."""
    ways = {"plan in place": {}, "a new plan, renumbered": {"tolerance": None}}
    table = Table("load", "change", "kept", *ways, "DeepSeek", title="imbalance (slots moved), %")
    for name, load in loads().items():
        old = plan(load, SERVICE)
        greedy = plan(load, SERVICE, strategy="greedy")
        for noise in (0, 0.001, 0.01, 0.05):
            now = load * np.random.default_rng(1).lognormal(0, noise, load.shape)
            cells = [f"{imbalance(now, old, SERVICE):.2%}"]
            for options in ways.values():
                new = plan(now, SERVICE, previous=old, **options)
                cells.append(f"{imbalance(now, new, SERVICE):.2%} ({moved(old, new, SERVICE):.1%})")
            new = plan(now, SERVICE, strategy="greedy")
            cells.append(f"{imbalance(now, new, SERVICE):.2%} ({moved(greedy, new, SERVICE):.1%})")
            table.add_row(name, f"{noise:.1%}", *cells)
    console.print(table)


def table_of_replays(console: Console) -> None:
    """The next window, with the default and with a new plan each time."""
    table = Table(
        "trace", "slots / GPUs", "a new plan each time", "default", title="next window, %"
    )
    for name, shuffled, slots, gpus in MEASURED:
        trace = eplb_jax.loads.example(name)
        if shuffled:
            trace = trace[np.random.default_rng(0).permutation(len(trace))]
        topology = Topology(gpus, slots=slots // gpus)
        cells = []
        for tolerance in (None, eplb_jax.TOLERANCE):
            found = replay(
                trace, plan_from_history(topology, tolerance=tolerance), topology, all_past=True
            )
            cells.append(f"{found.mean_imbalance:.2%} ({found.moves.mean() / slots:.1%})")
        order = ", random order" if shuffled else ""
        table.add_row(name + order, f"{slots} / {gpus}", *cells)
    console.print(table)


def table_of_events(console: Console) -> None:
    """8 GPUs: one in the middle leaves, two more leave, one comes, all come back."""
    masks = {"GPU 3 leaves": {3}, "5 and 6 leave": {3, 5, 6}, "5 comes": {3, 6}, "all come": set()}
    columns = "load", "event", "stay, of those that could", "from storage", "imbalance", "compiled"
    table = Table(*columns, title="8 GPUs")
    rng = np.random.default_rng(0)
    lite = eplb_jax.loads.example("deepseek_v2_lite").sum(axis=0)
    for name, load, slots in (("DeepSeek-V3", loads()["DeepSeek-V3"], 52), ("V2-Lite", lite, 40)):
        topology = Topology(8, slots=slots)
        step = jax.jit(partial(plan, topology=topology))
        old = plan(load, topology)
        for event, dead in masks.items():
            active = np.array([g not in dead for g in range(8)])
            now = (load * rng.lognormal(0, 0.05, load.shape)).astype(np.float32)
            new = step(now, previous=old.phy2log, active=active)
            eplb_jax.check_placement(new)
            transfer = eplb_jax.moves(old, new, topology, active=active)
            before = np.where(active[topology.gpu_of_slot], np.asarray(old.phy2log), -1)
            stay = np.sum((np.asarray(new.phy2log) == before) & (before >= 0))
            storage = np.asarray(transfer.copies)[:, 4].mean()
            table.add_row(
                f"{name}, {slots} slots each",
                event,
                f"{stay / np.sum(before >= 0):.1%}",
                f"{storage:.1f} a layer",
                f"{imbalance(now, new, topology):.2%}",
                str(traces(step)),
            )
            old = new
    console.print(table)


def traces(step: Any) -> int:
    """How often a jitted function was compiled."""
    return step._cache_size()


def median(call: Callable[[], object], repeats: int = 15) -> tuple[float, float]:
    """Milliseconds of a call, and seconds of the first."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    first, times = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times)), first


def table_of_times(console: Console) -> None:
    """A plan beside the plan in place, in milliseconds, and as a multiple of one from nothing."""
    table = Table(
        "shape", "loads", "new plan", "previous=", "max_moves=18", "=72", "=288", "active="
    )
    for layers, experts, topology in ((58, 256, SERVICE), (92, 896, Topology(64, slots=15))):
        rng = np.random.default_rng(0)
        load = (rng.lognormal(0, 1, (layers, experts)) * 1000).astype(np.float32)
        history, seen = eplb_jax.init_history(layers, experts), load
        for _ in range(12):
            seen = (load * rng.lognormal(0, 0.1, load.shape)).astype(np.float32)
            history = eplb_jax.update_history(history, seen)
        old = plan(load, topology)
        for name, now in (("1 window", seen), ("history", history)):
            base, first = median(partial(plan, now, topology))
            cells = [f"{base:.1f} (compiled in {first:.1f} s)"]
            limits = [{}, {"max_moves": 18}, {"max_moves": 72}, {"max_moves": 288}]
            for options in [*limits, {"active": np.ones(topology.num_gpus, bool)}]:
                took, first = median(partial(plan, now, topology, previous=old, **options))
                compiled = f", {first:.1f} s" if first > 1 else ""
                cells.append(f"{took:.1f} ({took / base:.1f} x{compiled})")
            table.add_row(f"{layers} x {experts} -> {topology.num_replicas}", name, *cells)
    console.print(table)


def random_events(console: Console, count: int) -> None:
    """Sequences of GPUs that leave and come: no expert may be lost."""
    topology, rng = Topology(8, slots=40), np.random.default_rng(0)
    load = loads()["DeepSeek-V3"][:2].astype(np.float32)
    step = jax.jit(partial(plan, topology=topology))
    old, active = plan(load, topology), np.ones(8, bool)
    for _ in range(count):
        active = active.copy()
        change = rng.permutation(8)[: rng.integers(1, 3)]
        active[change] = ~active[change]
        active[: 7 if active.sum() < 7 else 0] = True
        now = (load * rng.lognormal(0, 0.05, load.shape)).astype(np.float32)
        old = step(now, previous=old.phy2log, active=active)
        eplb_jax.check_placement(old)
        held = np.asarray(old.phy2log).reshape(2, 8, 40)
        assert np.all((held >= 0) == active[None, :, None])
    console.print(f"{count} events, no expert lost, {traces(step)} compilation")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a running service moves.")
    parser.add_argument("--events", type=int, default=0, help="number of random events")
    arguments = parser.parse_args()
    out = Console(width=160)
    for draw in (table_of_changes, table_of_replays, table_of_events, table_of_times):
        draw(out)
    if arguments.events:
        random_events(out, arguments.events)
