"""What each part of a history is worth: memory, evidence, prediction, and counts over windows.

    pip install '.[cli]'
    python benchmarks/memory.py            # the table: three minutes
    python benchmarks/memory.py --plot     # and the picture of a replay with and without memory

A plan every window, from all windows before it; the mean over layers and windows, from the 16th (or
24th of long traces) on, of max / mean GPU load - 1 in the next window. Columns: the whole history;
without groups of older windows; with equal weight for windows of any size; without the prediction;
and a plan for the mean of the history alone, whose counts and packing know no windows. Rows "mixed
sizes" add up 1 and 3 windows of the trace in turn.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import History, Topology

Change = Callable[[History], History]
PICTURE = Path(__file__).parent / "pictures" / "memory.png"


def shuffled(trace: np.ndarray, seed: int = 0) -> np.ndarray:
    return trace[np.random.default_rng(seed).permutation(len(trace))]


def mixed_sizes(trace: np.ndarray) -> np.ndarray:
    """The sums of 1 and 3 windows in turn."""
    starts = np.concatenate([[k, k + 1] for k in range(0, len(trace) - 3, 4)])
    return np.add.reduceat(trace[: starts[-1] + 3], starts)


def without_prediction(history: History) -> History:
    lead = jnp.full_like(history.scores.lead, -1.0)
    return history._replace(scores=history.scores._replace(lead=lead))


def imbalance(
    trace: np.ndarray,
    topology: Topology,
    *,
    start: int,
    remembered: int = 8,
    equal: bool = False,
    change: Change = lambda x: x,
    mean: bool = False,
) -> np.ndarray:
    """Of every window from `start` on, [T, L], with a plan from those before it."""
    history = eplb_jax.init_history(*trace.shape[1:], remembered=remembered)
    result = []
    for t, window in enumerate(trace):
        if t >= start:
            if mean:
                seen = trace[:t] / np.maximum(trace[:t].sum(axis=2, keepdims=True), 1)
                plan = eplb_jax.plan(seen.sum(axis=0), topology)
            else:
                plan = eplb_jax.plan(change(history), topology)
            result.append(eplb_jax.metrics.balance(window, plan, topology).imbalance)
        load = window / np.maximum(window.sum(axis=1, keepdims=True), 1) if equal else window
        history = eplb_jax.update_history(history, jnp.asarray(load, jnp.float32))
    return np.asarray(result)


VARIANTS = {
    "history": {},
    "no memory": {"remembered": 0},
    "equal weights": {"equal": True},
    "no prediction": {"change": without_prediction},
    "the mean alone": {"mean": True},
}


def cases() -> list[tuple[str, np.ndarray, Topology, int]]:
    gpt, decode, lite = map(
        eplb_jax.loads.example, ("gpt_oss_20b", "gpt_oss_20b_decode", "deepseek_v2_lite")
    )
    small, large = Topology(8, slots=5), Topology(8, slots=9)
    topics = eplb_jax.traces.generate("topics", 32, 8, 256, tokens=8192, seed=1)
    drift = eplb_jax.traces.generate("drift", 32, 8, 256, tokens=131072, change=0.1, seed=1)
    return [
        ("gpt_oss_20b", gpt, small, 24),
        ("gpt_oss_20b, shuffled", shuffled(gpt), small, 16),
        ("gpt_oss_20b_decode", decode, small, 24),
        ("gpt_oss_20b_decode, mixed sizes", mixed_sizes(decode), small, 10),
        ("deepseek_v2_lite", lite, large, 24),
        ("deepseek_v2_lite, shuffled", shuffled(lite), large, 24),
        ("deepseek_v2_lite, seed 123", shuffled(lite, 123), large, 24),
        ("deepseek_v2_lite, shuffled", shuffled(lite), Topology(16, slots=5), 24),
        ("deepseek_v2_lite, shuffled", shuffled(lite), Topology(40, slots=2), 24),
        ("topics", topics, Topology(32, slots=9), 20),
        ("topics, shuffled", shuffled(topics), Topology(32, slots=9), 20),
        ("topics, shuffled", shuffled(topics), Topology(64, slots=5), 20),
        ("topics, shuffled", shuffled(topics), Topology(144, slots=2), 20),
        ("drift", drift, Topology(32, slots=9), 20),
    ]


def table() -> Table:
    result = Table(title="imbalance of the next window, %", title_justify="left")
    for header in ("trace", "slots / GPUs", *VARIANTS):
        result.add_column(header, justify="left" if header == "trace" else "right")
    for name, trace, topology, start in cases():
        measure = partial(imbalance, trace.astype(float), topology, start=start)
        means = [100 * measure(**options).mean() for options in VARIANTS.values()]
        shape = f"{topology.num_replicas} / {topology.num_gpus}"
        result.add_row(name, shape, *(f"{x:.2f}" for x in means))
    return result


def draw() -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    lite = eplb_jax.loads.example("deepseek_v2_lite").astype(float)
    topology = Topology(8, slots=9)
    panels = [("four tasks, one after the other", lite), ("in random order", shuffled(lite))]
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        all_axes = figure.subplots(1, 2, sharey=True)
        for axes, (title, trace) in zip(all_axes, panels, strict=True):
            for remembered, label, color in (
                (0, "the last 8 windows", "#d62728"),
                (8, "and 8 groups of older ones", "#1f77b4"),
            ):
                curve = imbalance(trace, topology, start=2, remembered=remembered).mean(axis=1)
                axes.plot(range(2, len(trace)), 100 * curve, "o-", color=color, label=label)
            axes.set(title=f"DeepSeek-V2-Lite, {title}", xlabel="window")
        all_axes[0].set_ylim(bottom=0)
        all_axes[0].set_ylabel("imbalance, mean over layers, %")
        all_axes[0].legend(frameon=False, title="plans from")
        figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot:
        draw()
    Console(width=120).print(table())


if __name__ == "__main__":
    main()
