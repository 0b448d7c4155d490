"""Every strategy of `balanced_packing`: compile time, steady time and balance, in one table.

    python benchmarks/packing.py                       # ours alone
    python benchmarks/packing.py --originals DIR       # beside torch originals, DIR/NAME.py

Packs the replicas of a load (default: the bundled DeepSeek-V3-0324, 58 x 288 items into 32
packs). Each original is a file with `balanced_packing(weight, num_packs)` on torch tensors; it
runs on the same kind of device as JAX does. On a GPU or TPU the last column says whether the
packing is the one that the CPU finds, bit for bit.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import eplb_jax


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def imbalance(weight: np.ndarray, pack_index: np.ndarray, num_packs: int) -> np.ndarray:
    """Heaviest pack / mean pack - 1 of every layer, in float64."""
    inside = pack_index[:, None] == np.arange(num_packs)[:, None]
    loads = np.where(inside, weight.astype(np.float64)[:, None], 0).sum(axis=2)
    return loads.max(axis=1) / loads.mean(axis=1) - 1


def original(path: Path, weight: np.ndarray, num_packs: int) -> Callable[[], np.ndarray]:
    """The torch original as a call that returns its pack indices once they are there."""
    import torch

    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    tensor = torch.from_numpy(weight.copy()).to(device)

    def run() -> np.ndarray:
        return module.balanced_packing(tensor, num_packs)[0].cpu().numpy()

    return run


def measure(
    name: str, weight: np.ndarray, num_packs: int, originals: Path | None, repeat: int
) -> dict[str, float]:
    on_device = jax.device_put(jnp.asarray(weight))

    def ours() -> eplb_jax.Packing:
        return jax.block_until_ready(eplb_jax.balanced_packing(on_device, num_packs, strategy=name))

    first = seconds(ours)
    row: dict[str, float] = {}
    their_times: list[float] = []
    file = originals / f"{name}.py" if originals else None
    if file is not None and file.exists():
        theirs = original(file, weight, num_packs)
        row["original_imbalance"] = float(imbalance(weight, theirs(), num_packs).mean())
        for _ in range(3):
            their_times.append(seconds(theirs))
            if their_times[-1] > 5:
                break
    our_times = [seconds(ours) for _ in range(repeat)]
    steady = statistics.median(our_times)
    row |= {
        "compile_s": first - steady,
        "run_ms": steady * 1e3,
        "imbalance": float(imbalance(weight, np.asarray(ours().pack_index), num_packs).mean()),
    }
    if their_times:
        row["original_ms"] = statistics.median(their_times) * 1e3
    if jax.devices()[0].platform != "cpu":
        with jax.default_device(jax.devices("cpu")[0]):
            on_cpu = eplb_jax.balanced_packing(weight, num_packs, strategy=name)
        row["as_on_cpu"] = bool(np.array_equal(on_cpu.pack_index, ours().pack_index))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and balance of every strategy")
    parser.add_argument("--originals", type=Path, help="folder of the torch originals")
    parser.add_argument("--load", type=Path, help="a load file; default: the bundled one")
    parser.add_argument("--replicas", type=int, default=288)
    parser.add_argument("--packs", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--strategies", nargs="+", default=[*eplb_jax.STRATEGIES])
    parser.add_argument("--json", type=Path, help="append one JSON line a strategy")
    options = parser.parse_args()

    load = eplb_jax.loads.read(options.load) if options.load else eplb_jax.loads.example()
    load = load.sum(axis=0) if load.ndim == 3 else load
    replication = eplb_jax.replicate_experts(load, options.replicas)
    per_replica = load / np.asarray(replication.logcnt)
    weight = np.take_along_axis(per_replica, np.asarray(replication.phy2log), axis=1)
    weight = weight.astype(np.float32)

    device = jax.devices()[0].device_kind
    shape = f"{weight.shape[0]} x {weight.shape[1]} into {options.packs}"
    table = Table(title=f"{shape}, {device}, jax {jax.__version__}", title_justify="left")
    columns = "compile s", "run ms", "original ms", "speed-up", "imbalance %", "original %", "ratio"
    columns += ("as on CPU",) if jax.devices()[0].platform != "cpu" else ()
    for column in ("strategy", *columns):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name in options.strategies:
        row = measure(name, weight, options.packs, options.originals, options.repeat)
        cells = [f"{row['compile_s']:.2f}", f"{row['run_ms']:.2f}"]
        if "original_ms" in row:
            cells += [f"{row['original_ms']:.1f}", f"{row['original_ms'] / row['run_ms']:.1f}"]
        else:
            cells += ["", ""]
        cells.append(f"{row['imbalance']:.4%}".rstrip("%"))
        if "original_ms" in row:
            cells.append(f"{row['original_imbalance']:.4%}".rstrip("%"))
            cells.append(f"{row['imbalance'] / row['original_imbalance']:.3f}")
        else:
            cells += ["", ""]
        if "as_on_cpu" in row:
            cells.append("yes" if row["as_on_cpu"] else "no")
        table.add_row(name, *cells)
        if options.json:
            described = {
                "strategy": name,
                "shape": shape,
                "device": device,
                "host": platform.machine(),
                "jax": jax.__version__,
            }
            with options.json.open("a") as file:
                file.write(json.dumps(described | row) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
