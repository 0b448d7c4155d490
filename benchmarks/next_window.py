"""Balance of plans in the window after those they were made from, and the moves they need.

    pip install '.[cli]'
    python benchmarks/next_window.py            # tables: two minutes
    python benchmarks/next_window.py --plot     # also the picture of imbalance against max_moves

One plan per window, from an `eplb_jax.History` of the eight windows before and eight groups of
older ones; the mean over layers and windows of max / mean GPU load - 1. Measured traces are the
bundled ones, the one of DeepSeek-V2-Lite also in random order; synthetic ones come from
`eplb_jax.traces`. There `auto` also plans for the last window alone, the mean of the last eight and
exponentially weighted means of them.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import (
    Topology,
    plan_from_history,
    plan_from_last_window,
    replay,
)
from eplb_jax.evaluation.replay import Planner

MEASURED = [
    ("gpt_oss_20b", False, 40, 8),
    ("gpt_oss_20b_decode", False, 40, 8),
    ("deepseek_v2_lite", False, 72, 8),
    ("deepseek_v2_lite", True, 72, 8),
    ("deepseek_v2_lite", True, 80, 16),
    ("deepseek_v2_lite", True, 80, 40),
]
SYNTHETIC = [
    ("stationary, 1k tokens", "stationary", {"tokens": 1024}),
    ("stationary, 8k", "stationary", {"tokens": 8192}),
    ("stationary, 128k", "stationary", {"tokens": 131072}),
    ("drift 0.05, 128k", "drift", {"tokens": 131072, "change": 0.05}),
    ("drift 0.1, 128k", "drift", {"tokens": 131072, "change": 0.1}),
    ("drift 0.3, 128k", "drift", {"tokens": 131072, "change": 0.3}),
    ("drift 0.1, 8k", "drift", {"tokens": 8192, "change": 0.1}),
    ("bursts, 8k", "bursts", {"tokens": 8192}),
    ("topics, 8k", "topics", {"tokens": 8192}),
]
GAINS = (0.7, 0.5, 0.3, 0.15)
PICTURE = Path(__file__).parent / "pictures" / "moves.png"


def measured(name: str, shuffled: bool) -> np.ndarray:
    trace = eplb_jax.loads.example(name)
    return trace[np.random.default_rng(0).permutation(len(trace))] if shuffled else trace


def plan_from_mean(topology: Topology, gain: float | None) -> Planner:
    """`auto` for a mean of the windows: exponentially weighted with this gain, or plain."""

    def plan(past: np.ndarray, placed: eplb_jax.Placement | None) -> eplb_jax.Placement:
        del placed
        past = past[-8:]
        share = past / past.sum(axis=2, keepdims=True)
        age = np.arange(len(past))[::-1]
        weight = np.ones(len(past)) if gain is None else (1 - gain) ** age
        mean = np.tensordot(weight, share, axes=1)
        return eplb_jax.plan(mean, topology)

    return plan


def measure(trace: np.ndarray, planner: Planner, topology: Topology) -> tuple[float, float, float]:
    """Imbalance in %, moves per layer and plan, and milliseconds of a plan."""
    result = replay(trace, planner, topology, all_past=True)
    slots = result.moves.mean() if result.moves.size else 0.0
    return 100 * result.mean_imbalance, slots, 1e3 * float(np.median(result.seconds))


def table_of_measured(strategy: str) -> Table:
    table = Table(title="measured", title_justify="left")
    headers = ["deepseek", "moved", strategy, "moved", "ms", "25 % of slots", "moved", "ms"]
    for header in ["trace", "slots / GPUs", *headers]:
        table.add_column(header, justify="left" if header == "trace" else "right")
    for name, shuffled, slots, gpus in MEASURED:
        trace, topology = measured(name, shuffled), Topology(gpus, slots // gpus)
        row = [f"{name}{', shuffled' * shuffled}", f"{slots} / {gpus}"]
        for planner in (
            plan_from_last_window(topology),
            plan_from_history(topology, strategy=strategy, tolerance=None),
            plan_from_history(topology, strategy=strategy),
        ):
            imbalance, moved, ms = measure(trace, planner, topology)
            row += [f"{imbalance:.2f}", f"{100 * moved / slots:.0f} %", f"{ms:.1f}"]
        table.add_row(*row[:4], *row[5:])
    return table


def table_of_synthetic(strategy: str, shape: tuple[int, int], topology: Topology) -> Table:
    slots, gpus = topology.num_replicas, topology.num_gpus
    title = f"synthetic, {shape[0]} layers x {shape[1]} experts, {slots} slots on {gpus} GPUs"
    table = Table(title=title, title_justify="left")
    for header in ["trace", "deepseek", "last", "mean", "best EWMA", strategy, "of the best"]:
        table.add_column(header, justify="left" if header == "trace" else "right")
    for label, kind, options in SYNTHETIC:
        trace = eplb_jax.traces.generate(kind, 24, *shape, seed=1, **options)
        values = [
            measure(trace, planner, topology)[0]
            for planner in (
                plan_from_last_window(topology),
                plan_from_last_window(topology, strategy="auto"),
                *(plan_from_mean(topology, gain) for gain in (None, *GAINS)),
                plan_from_history(topology, strategy=strategy, keep=False),
            )
        ]
        shown = [*values[:3], min(values[3:-1]), values[-1]]
        best = min(values[1:-1])
        table.add_row(label, *(f"{x:.2f}" for x in shown), f"{values[-1] / best:.3f}")
    return table


def draw(strategy: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cases = [
        ("DeepSeek-V2-Lite, 72 slots on 8 GPUs", measured("deepseek_v2_lite", False), 72, 8),
        ("the same, windows in random order", measured("deepseek_v2_lite", True), 72, 8),
        (
            "drift 0.1, 58 layers, 288 slots on 32 GPUs",
            eplb_jax.traces.generate("drift", 16, 58, 256, tokens=131072, seed=1),
            288,
            32,
        ),
    ]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        for axes, (title, trace, slots, gpus) in zip(figure.subplots(1, 3), cases, strict=True):
            topology = Topology(gpus, slots // gpus)
            limits = [round(slots * x) for x in (0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6)]
            curve = [
                measure(
                    trace, plan_from_history(topology, strategy=strategy, max_moves=x), topology
                )
                for x in limits
            ]
            free = measure(
                trace, plan_from_history(topology, strategy=strategy, tolerance=None), topology
            )
            greedy = measure(trace, plan_from_last_window(topology), topology)
            moved = [100 * x / slots for _, x, _ in curve]
            axes.plot(moved, [x for x, _, _ in curve], "o-", color="#1f77b4", label="max_moves")
            for (imbalance, x, _), label, color in (
                (free, "no limit", "#1f77b4"),
                (greedy, "DeepSeek, last window", "#d62728"),
            ):
                axes.plot(100 * x / slots, imbalance, "s", color=color, label=label)
            axes.set(title=title, xlabel="slots moved between GPUs per plan, %", xlim=(-3, 103))
            axes.set_ylim(bottom=0)
            print(title, [(x, f"{y:.2f}") for x, (y, _, _) in zip(limits, curve, strict=True)])
        figure.axes[0].set_ylabel("imbalance of the next window, %")
        figure.axes[0].legend(frameon=False)
        figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(table_of_measured(arguments.strategy))
    console.print(table_of_synthetic(arguments.strategy, (12, 256), Topology(32, slots=9)))
    if arguments.plot:
        draw(arguments.strategy)


if __name__ == "__main__":
    main()
