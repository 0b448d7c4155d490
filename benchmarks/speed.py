"""Time, memory and balance of whole plans beside what others run, one table per shape.

    python benchmarks/speed.py                                   # greedy, fast, auto: two minutes
    python benchmarks/speed.py --shapes all --strategies all     # everything: hours
    python benchmarks/speed.py --originals DIR                   # and packing beside DIR/NAME.py
    python benchmarks/speed.py --strategies all --plot benchmarks/pictures

Loads are on the device and plans stay there. All sides take turns in every round, so noise affects
them alike; what takes longer than 0.3 s runs 3 times. "compile" is the first call less the median.
"peak" is what XLA reserves for arguments, results and temporaries. `peers.py` says what the other
sides are; theirs is the global plan of the sum of windows on every shape, on the CPU. On a GPU
"fast K" and "auto K" are the same searches in kernels, and "as on CPU" says whether plans are those
of the CPU, bit for bit.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
from cases import SHAPES, Calls, Shape, load_of, plan, timed
from originals import beside_originals, cpus
from rich.console import Console
from rich.table import Table

import eplb_jax

Row = dict[str, Any]


GROWTH = {  # panel: what grows, and its shapes
    "layers": {n: Shape(n, 256, 288, 32) for n in (1, 4, 16, 64, 512)},
    "experts, 8 and a spare a GPU": {
        n: Shape(58, n, n * 9 // 8, n // 8) for n in (64, 128, 256, 512, 1024)
    },
    "GPUs": {n: Shape(58, 256, 288, n) for n in (8, 16, 32, 72, 144, 288)},
}


def by_name(name: str) -> eplb_jax.Strategy:
    """The strategy; with a K at the end its form in kernels for CUDA."""
    return eplb_jax.in_kernels(name[:-2]) if name.endswith(" K") else eplb_jax.STRATEGIES[name]


def sides(shape: Shape, load: np.ndarray, strategies: Iterable[str]) -> Calls:
    """Our strategies and their peers, as calls."""
    weight = jax.device_put(jnp.asarray(load))
    summed = load if load.ndim == 2 else load.sum(axis=0)
    ours = {name: lambda name=name: plan(weight, shape, by_name(name)) for name in strategies}
    theirs = {
        name: lambda peer=peer: peer(summed, shape.replicas, shape.gpus)
        for name, peer in peers.available().items()
    }
    return ours | theirs


def peak_mib(weight: np.ndarray, shape: Shape, strategy: str) -> float | None:
    compiled = jax.jit(lambda x: plan(x, shape, by_name(strategy))).lower(weight).compile()
    memory: Any = compiled.memory_analysis()
    if memory is None:
        return None
    parts = "argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"
    return sum(getattr(memory, part) for part in parts) / 2**20


def measure(shape: Shape, strategies: list[str], repeat: int) -> list[Row]:
    """One row for every side."""
    load = load_of(shape)
    times = timed(sides(shape, load, strategies), repeat)
    plans = {name: np.asarray(side.result[0]) for name, side in times.items()}
    if shape.policy == "global" and shape.windows == 1:
        same = [name for name in plans if name == "greedy" or name not in strategies]
        peers.check_equal(load, {name: plans[name] for name in same}, shape.gpus)
    rows = []
    for name, (first, steady, least, _) in times.items():
        peer = name not in strategies
        side = f"{name}, global" if peer and shape.policy != "global" else name
        row: Row = {"shape": str(shape), "side": side, "peer": peer}
        row |= {"run_ms": 1e3 * steady, "least_ms": 1e3 * least}
        row |= {"duplicates": peers.duplicates(plans[name], shape.gpus)}
        row["imbalance"] = float(peers.imbalance(load, plans[name], shape.gpus).mean())
        if "heap_lpt" in times:
            row["x_heap_lpt"] = steady / times["heap_lpt"].steady
        if not peer:
            row |= {"compile_s": first - steady, "peak_mib": peak_mib(load, shape, name)}
            if jax.default_backend() != "cpu":
                with jax.default_device(jax.devices("cpu")[0]):
                    on_cpu = plan(load, shape, name.removesuffix(" K")).phy2log
                row["as_on_cpu"] = np.array_equal(on_cpu, plans[name])
        rows.append(row)
    return rows


def import_ratio(runs: int = 5) -> float:
    """Import time of eplb_jax, jax included, by that of jax alone, in fresh interpreters."""
    code = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"
    times: dict[str, list[float]] = {"eplb_jax": [], "jax": []}
    for name in [*times] * runs:
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True
        )
        times[name].append(float(done.stdout))
    return statistics.median(times["eplb_jax"]) / statistics.median(times["jax"])


def growth(strategies: list[str], repeat: int) -> list[Row]:
    """Time against layers, experts and GPUs."""
    rows = []
    for panel, shapes in GROWTH.items():
        for size, shape in shapes.items():
            calls = sides(shape, load_of(shape), strategies)
            few = {name: calls[name] for name in calls if name in (*strategies, "heap_lpt")}
            rows += [
                {"shape": str(shape), "side": name, "panel": panel, "size": size}
                | {"run_ms": 1e3 * side.steady}
                for name, side in timed(few, repeat).items()
            ]
    return rows


def versions() -> Row:
    known: Row = {"device": jax.devices()[0].device_kind, "cpus": cpus()}
    for name in ("eplb-jax", "jax", "jaxlib", "numpy", "torch"):
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known[name] = None
    return known


SPEED = {  # column: key of the row, format
    "side": ("side", "{}"),
    "compile s": ("compile_s", "{:.2f}"),
    "run ms": ("run_ms", "{:.2f}"),
    "x heap LPT": ("x_heap_lpt", "{:.2f}"),
    "peak MiB": ("peak_mib", "{:.1f}"),
    "imbalance": ("imbalance", "{:.4%}"),
    "twice on a GPU": ("duplicates", "{}"),
    "as on CPU": ("as_on_cpu", "{}"),
}
PACKING = {
    "packing": ("packing", "{}"),
    "run ms": ("ours_ms", "{:.2f}"),
    "original ms": ("original_ms", "{:.1f}"),
    "speed-up": ("speed_up", "{:.1f}"),
    "imbalance": ("ours_imbalance", "{:.4%}"),
    "original's": ("original_imbalance", "{:.4%}"),
}
GROWN = {"": ("panel", "{}"), "size": ("size", "{}"), **{k: SPEED[k] for k in ("side", "run ms")}}


def show(title: str, columns: Mapping[str, tuple[str, str]], rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    shown = {k: v for k, v in columns.items() if any(row.get(v[0]) is not None for row in rows)}
    for column in shown:
        table.add_column(column, justify="left" if column == next(iter(shown)) else "right")
    for row in rows:
        cells = ((row.get(key), form) for key, form in shown.values())
        table.add_row(*("" if value is None else form.format(value) for value, form in cells))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans of ours and of others, side by side")
    known = [*eplb_jax.STRATEGIES]
    parser.add_argument(
        "--strategies", nargs="+", default=["greedy", "fast", "auto"], choices=[*known, "all"]
    )
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES][:3], choices=[*SHAPES, "all"])
    parser.add_argument("--originals", type=Path, help="folder of torch originals of strategies")
    parser.add_argument("--growth", action="store_true", help="time against the size, too")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    parser.add_argument("--plot", type=Path, help="draw speed.png and growth.png in this folder")
    options = parser.parse_args()
    strategies = known if "all" in options.strategies else options.strategies
    if jax.default_backend() == "gpu":
        strategies = [*strategies, *(f"{x} K" for x in ("fast", "auto") if x in strategies)]
    shapes = [*SHAPES] if "all" in options.shapes else options.shapes

    about = versions()

    def report(title: str, columns: Mapping[str, tuple[str, str]], rows: list[Row]) -> None:
        show(title, columns, rows)
        if options.json:
            with options.json.open("a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)

    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"import eplb_jax: {import_ratio():.2f} times the import of jax")
    first: list[Row] = []
    for shape in (SHAPES[name] for name in shapes):
        rows = measure(shape, strategies, options.repeat)
        first = first or rows
        report(str(shape), SPEED, rows)
        if options.originals and shape.policy == "global" and shape.windows == 1:
            rows = beside_originals(shape, options.originals, options.repeat)
            report(f"{shape}, balanced_packing alone", PACKING, rows)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if used:
        print(f"device memory of this process at its peak: {used / 2**20:.0f} MiB")
    if options.growth or options.plot:
        rows = growth(["greedy", "fast", "auto"], options.repeat)
        report("growth", GROWN, rows)
        if options.plot:
            from drawing import draw_growth, draw_speed

            options.plot.mkdir(parents=True, exist_ok=True)
            draw_speed(options.plot / "speed.png", first)
            draw_growth(options.plot / "growth.png", rows)


if __name__ == "__main__":
    main()
