"""The gap of every strategy to the proven bound, over loads and shapes.

    python benchmarks/quality.py                                  # the bundled and drawn loads
    python benchmarks/quality.py --load r1.npz v2_lite.npz        # and files of measured loads
    python benchmarks/quality.py --json out.jsonl --plot quality.png

One row per load and shape, one column per strategy: the median over layers of max GPU load / bound
- 1, and in parentheses the 95th percentile, each in units of 1e-4; then the number of slots with an
expert that another slot of their GPU holds, if there are any. Shapes that a load does not fit (more
experts than slots) are left out. The picture is of imbalance against the time of a whole plan, on
the bundled load with 288 slots on 32 GPUs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from peers import duplicates
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import Topology

SHAPES = {
    "c >= 7": [(288, 32), (416, 32), (448, 64), (144, 16), (72, 8), (36, 4)],
    "c = 5": [(320, 64), (160, 32), (80, 16), (40, 8)],
    "c = 4": [(288, 72), (576, 144), (144, 36), (72, 18), (36, 9)],
    "c = 3": [(288, 96), (144, 48), (72, 24), (36, 12)],
    "c = 2": [(288, 144), (320, 160)],
    "no spares": [(256, 32), (512, 64), (256, 8)],
}


def drawn_loads(layers: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Loads of the kinds that are used to compare balancers."""
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, 257)
    return {
        "lognormal 0.5": rng.lognormal(sigma=0.5, size=(layers, 256)),
        "lognormal 1": rng.lognormal(sigma=1, size=(layers, 256)),
        "lognormal 1, 128": rng.lognormal(sigma=1, size=(layers, 128)),
        "lognormal 1, 512": rng.lognormal(sigma=1, size=(layers, 512)),
        "zipf 1": rng.permuted(np.tile(zipf, (layers, 1)), axis=1),
        "gamma 0.5": rng.gamma(0.5, size=(layers, 256)),
        "uniform": rng.uniform(size=(layers, 256)),
    }


def fits(num_experts: int, num_replicas: int, kind: str) -> bool:
    """Without spares where the shape says so, else with up to 80 % of them."""
    if kind == "no spares":
        return num_replicas == num_experts
    return num_experts < num_replicas <= 1.8 * num_experts


def measure(
    load: np.ndarray, num_replicas: int, num_gpus: int, strategy: str, runs: int
) -> dict[str, float]:
    topology = Topology.of_replicas(num_replicas, num_gpus)

    def plan() -> eplb_jax.Placement:
        return jax.block_until_ready(eplb_jax.plan(load, topology, strategy=strategy))

    start = time.perf_counter()
    placement = plan()
    first, times = time.perf_counter() - start, []
    for _ in range(runs):
        start = time.perf_counter()
        plan()
        times.append(time.perf_counter() - start)
    gap = np.asarray(eplb_jax.metrics.gap(load, placement, topology))
    balance = eplb_jax.metrics.balance(load, placement, topology)
    return {
        "gap_median": float(np.median(gap)),
        "gap_p95": float(np.quantile(gap, 0.95)),
        "imbalance": float(balance.mean_imbalance),
        "duplicates": duplicates(np.asarray(placement.phy2log), num_gpus),
        "run_ms": statistics.median(times) * 1e3,
        "compile_s": first - statistics.median(times),
    }


def draw(path: Path, strategies: list[str], runs: int) -> None:
    from matplotlib.figure import Figure

    load = eplb_jax.loads.example().sum(axis=0)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in strategies:
        row = measure(load, 288, 32, name, runs)
        ours = name in ("auto", "fast", "best")
        axes.scatter(row["run_ms"], 100 * row["imbalance"], s=50, zorder=3,
                     color="#1f77b4" if ours else "#b9b9b9")  # fmt: skip
        axes.annotate(name, (row["run_ms"], 100 * row["imbalance"]), xytext=(6, 4),
                      textcoords="offset points", weight="bold" if ours else "normal")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="a whole plan of 58 layers, ms",
             ylabel="imbalance (max / mean GPU load - 1), %",
             title="DeepSeek-V3-0324, 288 slots on 32 GPUs, 2-core CPU")  # fmt: skip
    axes.grid(alpha=0.3, which="major")
    axes.margins(0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gap to the proven bound")
    parser.add_argument("--load", type=Path, nargs="+", default=[], help="files of loads")
    parser.add_argument("--strategies", nargs="+", default=["greedy", "fast", "auto", "best"])
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each")
    parser.add_argument("--json", type=Path, help="append one JSON line a cell")
    parser.add_argument("--plot", type=Path, help="draw imbalance against time there")
    options = parser.parse_args()
    if options.plot:
        draw(options.plot, options.strategies, max(options.runs, 9))
        return

    loads = {"DeepSeek-V3-0324": eplb_jax.loads.example()} | drawn_loads()
    loads |= {path.stem: eplb_jax.formats.read(path).load for path in options.load}
    table = Table(title=f"gap to the bound, 1e-4, jax {jax.__version__}", title_justify="left")
    for column in ("load", "slots / GPUs", *options.strategies):
        table.add_column(column, justify="left" if column == "load" else "right")
    for kind, shapes in SHAPES.items():
        table.add_section()
        table.add_row(kind, style="bold")
        for name, load in loads.items():
            counts = load.sum(axis=0) if load.ndim == 3 else load
            for num_replicas, num_gpus in shapes:
                if not fits(counts.shape[1], num_replicas, kind):
                    continue
                cells = []
                for strategy in options.strategies:
                    row = measure(counts, num_replicas, num_gpus, strategy, options.runs)
                    cell = f"{row['gap_median'] * 1e4:.2f} ({row['gap_p95'] * 1e4:.1f})"
                    cells.append(
                        cell + (f", {row['duplicates']} twice" if row["duplicates"] else "")
                    )
                    if options.json:
                        described = {"load": name, "slots": num_replicas, "gpus": num_gpus,
                                     "strategy": strategy, "jax": jax.__version__,
                                     "device": jax.devices()[0].device_kind}  # fmt: skip
                        with options.json.open("a") as file:
                            file.write(json.dumps(described | row) + "\n")
                table.add_row(name, f"{num_replicas} / {num_gpus}", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
