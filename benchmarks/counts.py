"""The distance of replica counts to the optimum where GPUs have two slots.

    pip install '.[benchmarks]'
    python benchmarks/counts.py                       # small and medium cases: some minutes
    python benchmarks/counts.py --shape 256,288,144 --limit 60

With two slots a GPU only the counts matter: the best packing is the fold, largest with smallest. A
CP-SAT model decides by Hall's condition whether counts exist whose fold stays below a load T, and
bisection finds the least T to 0.05 % of the mean. Per strategy: the imbalance of its plans, and the
share of the gap between greedy counts and the optimum that it closes, as the mean over cases whose
optimum is proven and at least 0.1 % better than greedy counts.
"""

import argparse
import time

import jax
import numpy as np
from ortools.sat.python import cp_model  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import Topology

SHAPES = [(16, 20, 10), (32, 40, 20), (32, 48, 24), (64, 72, 36), (64, 80, 40), (128, 144, 72)]
TOLERANCE = 5e-4


def cases(num_experts: int, layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    measured = np.asarray(eplb_jax.loads.example()).sum(axis=0).astype(float)
    some = np.linspace(0, len(measured) - 1, layers).astype(int)
    return {
        "DeepSeek-V3-0324": measured[some][:, rng.permutation(256)[:num_experts]],
        "lognormal 0.5": rng.lognormal(sigma=0.5, size=(layers, num_experts)),
        "lognormal 1": rng.lognormal(sigma=1, size=(layers, num_experts)),
        "gamma 2": rng.gamma(2, size=(layers, num_experts)),
        "uniform": rng.uniform(size=(layers, num_experts)),
    }


def feasible(load: np.ndarray, num_replicas: int, most: float, limit: float) -> bool | None:
    """Whether counts exist whose fold has no pair above `most`; None: not known in time."""
    least = np.maximum(np.ceil(load / most - 1e-9), 1).astype(int)
    spare = num_replicas - least.sum()
    if spare < 0:
        return False
    model = cp_model.CpModel()
    chosen = {}
    for expert, low in enumerate(least):
        options = range(low, low + spare + 1)
        for count in options:
            chosen[expert, count] = model.new_bool_var("")
        model.add_exactly_one(chosen[expert, count] for count in options)
    model.add(sum(count * x for (_, count), x in chosen.items()) == num_replicas)
    share = {key: load[key[0]] / key[1] for key in chosen}
    for value in {x for x in share.values() if x > most / 2}:
        heavy = sum(k[1] * x for k, x in chosen.items() if share[k] >= value)
        light = sum(k[1] * x for k, x in chosen.items() if share[k] <= most - value)
        model.add(heavy <= light)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    known = {cp_model.OPTIMAL: True, cp_model.FEASIBLE: True, cp_model.INFEASIBLE: False}
    return known.get(status)


def optimum(
    load: np.ndarray, num_replicas: int, reached: float, limit: float
) -> tuple[float, float]:
    """The least known maximum load of a pair, and a lower bound; `reached` is known."""
    num_gpus = num_replicas // 2
    mean = load.sum() / num_gpus
    best, bound = reached, float(eplb_jax.plan_bound(load, Topology(num_gpus, slots=2)))
    while best - bound > TOLERANCE * mean:
        middle = (best + bound) / 2
        answer = feasible(load, num_replicas, middle, limit)
        if answer is None:
            break
        best, bound = (middle, bound) if answer else (best, middle)
    return best, bound


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of replicas against CP-SAT")
    parser.add_argument("--shape", action="append", help="experts,slots,GPUs; slots = 2 GPUs")
    parser.add_argument("--strategies", nargs="+", default=["fast", "auto", "best"])
    parser.add_argument("--layers", type=int, default=3, help="of every kind of load")
    parser.add_argument("--limit", type=float, default=20, help="seconds for one question")
    options = parser.parse_args()
    shapes = [tuple(int(x) for x in s.split(",")) for s in options.shape or []] or SHAPES

    names = ["greedy", *options.strategies]
    table = Table(title=f"imbalance, % (share of the gap closed), jax {jax.__version__}")
    for column in ("experts, slots, GPUs", "load", "proven", *names, "optimum"):
        table.add_column(column, justify="left" if column == "load" else "right")
    way: dict[str, list[float]] = {name: [] for name in options.strategies}
    start = time.perf_counter()
    for shape in shapes:
        num_experts, num_replicas, num_gpus = shape
        for kind, load in cases(num_experts, options.layers).items():
            mean = load.sum(axis=1) / num_gpus
            topology, largest = Topology(num_gpus, slots=2), {}
            for name in names:
                plan = eplb_jax.plan(load, topology, strategy=name)
                gpu_load = eplb_jax.metrics.balance(load, plan, topology).gpu_load
                largest[name] = np.asarray(gpu_load).max(axis=1)
            reached = np.min([*largest.values()], axis=0) * (1 + 1e-6)
            ends = [
                optimum(x, num_replicas, r, options.limit)
                for x, r in zip(load, reached, strict=True)
            ]
            best, bound = np.array(ends).T
            proven = best - bound <= TOLERANCE * mean * 1.01
            to_gain = largest["greedy"] - best
            counted = proven & (to_gain > 1e-3 * mean)
            cells = []
            for name, reached in largest.items():
                cell = f"{100 * np.mean(reached / mean - 1):.2f}"
                if name in way and counted.any():
                    gone = (largest["greedy"] - reached)[counted] / to_gain[counted]
                    way[name] += gone.tolist()
                    cell += f" ({gone.mean():.0%})"
                cells.append(cell)
            table.add_row(
                ", ".join(map(str, shape)),
                kind,
                f"{proven.sum()} of {len(load)}",
                *cells,
                f"{100 * np.mean(best / mean - 1):.2f}",
            )
        table.add_section()
    console = Console(width=130)
    console.print(table)
    for name, gone in way.items():
        console.print(
            f"{name}: closes {np.mean(gone):.0%} of the gap in the mean of {len(gone)} cases, "
            f"{np.quantile(gone, 0.1):.0%} in the worst tenth"
        )
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
