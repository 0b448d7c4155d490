"""Time of plans in this checkout beside another one, in turn.

    git worktree add ../before dbbb24a
    python benchmarks/against.py ../before

DeepSeek-V3-0324, 58 layers of 256 experts in 288 slots on 32 GPUs, global policy. Each checkout is
imported by a process of its own; the two take turns round by round, so noise affects them alike.
Medians of calls after warm-up, and the first call less the median as the time of compilation.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = ("greedy", "fast", "auto", "auto, 8 windows")
HERE = Path(__file__).resolve()


def work() -> None:
    """Reads the number of a case and of calls; prints the seconds of each call."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import eplb_jax

    load = np.asarray(eplb_jax.loads.example().sum(axis=0), np.float32)
    noise = np.random.default_rng(0).lognormal(sigma=0.1, size=(8, *load.shape))
    windows = jnp.asarray(load * noise, jnp.float32)
    for line in sys.stdin:
        case, count = map(int, line.split())
        strategy, _, several = CASES[case].partition(",")
        weight = windows if several else jnp.asarray(load)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            plan = eplb_jax.rebalance_experts(
                weight, 288, 8, 4, 32, policy="global", strategy=strategy
            )
            jax.block_until_ready(tuple(plan))
            times.append(time.perf_counter() - start)
        print(*times, flush=True)


def worker(checkout: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(HERE)!r})['work']()"]
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def seconds(process: subprocess.Popen, case: int, count: int) -> list[float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{case} {count}\n")
    process.stdin.flush()
    return [float(x) for x in process.stdout.readline().split()]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="This checkout beside another one")
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=5, help="calls of a turn")
    options = parser.parse_args()
    sides = {"before": worker(options.checkout), "now": worker(HERE.parents[1])}
    table = Table(title=f"plans of 58 x 256 -> 288 / 32, {options.rounds} rounds")
    for column in ("", *(f"{x}, ms" for x in sides), "ratio", *(f"compile {x}, s" for x in sides)):
        table.add_column(column, justify="right" if column else "left")
    for case, name in enumerate(CASES):
        first = {side: seconds(process, case, 1)[0] for side, process in sides.items()}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.rounds):
            for side in [*sides][:: 1 if turn % 2 else -1]:
                times[side] += seconds(sides[side], case, options.calls)
        median = {side: statistics.median(x) for side, x in times.items()}
        row = [f"{median[side] * 1e3:.2f}" for side in sides]
        row += [f"{median['now'] / median['before']:.2f}"]
        table.add_row(name, *row, *(f"{first[side] - median[side]:.2f}" for side in sides))
    Console(width=110).print(table)
    for process in sides.values():
        process.terminate()


if __name__ == "__main__":
    main()
