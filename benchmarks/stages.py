"""Where the time of a plan goes, and how near it is to what the machine allows.

    python benchmarks/stages.py
    python benchmarks/stages.py --strategies auto --shape v3-windows

Runs compiled plans under JAX's profiler and adds up kernels by stage, the outermost
`jax.named_scope` of each. While no kernel runs, time goes to the innermost loop; what the profiler
itself costs a tiny kernel is taken off. Beside it stand three floors: kernels launched times what
a tiny one costs in a loop, bytes by bandwidth, operations by peak; launches and the larger of the
others add up to the floor. Machine figures are measured in the same run. XLA's own cost analysis
counts the body of a loop once; here kernels count as often as they were seen, with the bytes and
operations that their shapes say, slices and updates in place at what they touch.
"""

import argparse
import gzip
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cases import SHAPES, Shape, load_of, plan, timed
from hlo import parsed
from jax import lax
from rich.console import Console
from rich.table import Table

LOOPS = "while", "call", "conditional"


def traced(run: Callable[[], Any]) -> list[dict[str, Any]]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def spans(events: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Start, end and instruction of everything that ran; on a GPU, of what its streams did."""
    threads = {
        (e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("name") == "thread_name"
    }
    streams = {key for key, name in threads.items() if name.startswith("Stream")}
    starts, ends = defaultdict(list), defaultdict(list)
    for e in sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"]):
        args = e.get("args", {})
        if e["name"].startswith("end: "):
            ends[e["name"][5:]].append(e["ts"])
        elif (e["pid"], e["tid"]) in streams if streams else "hlo_op" in args:
            starts[args.get("hlo_op", e["name"])].append((e["ts"], e["ts"] + e["dur"]))
    found = []
    for name, pairs in starts.items():
        # On a CPU a kernel shared among cores goes on after its launch returns.
        last = ends[name] if len(ends[name]) == len(pairs) else [end for _, end in pairs]
        found += [(s, max(e, x), name) for (s, e), x in zip(pairs, last, strict=True)]
    return found


def shares(found: list[tuple[float, float, str]], loops: set[str]) -> dict[str, float]:
    """Microseconds of every instruction; what runs together shares the time."""
    edges = [(t, i) for i, (start, end, _) in enumerate(found) for t in (start, end)]
    time, active, last = defaultdict(float), {}, 0.0
    for t, i in sorted(edges):
        running = [x for x in active if found[x][2] not in loops] or list(active)[-1:]
        for x in running:
            time[found[x][2]] += (t - last) / len(running)
        if active.pop(i, True):
            active[i] = False
        last = t
    return time


class Machine(NamedTuple):
    """Seconds of a tiny kernel in a loop, more under the profiler; bytes, operations a second."""

    launch: float
    profiler: float
    bandwidth: float
    peak: float


def machine() -> Machine:
    """Measured in loops: a chain of tiny kernels, and one array read and written in every step.

    Of some sizes of the array the best counts, cache or not.
    """
    steps = 100

    def loop(step: Callable[[jax.Array], jax.Array], size: int) -> Callable[[], jax.Array]:
        x = jnp.zeros(size, jnp.float32)
        run = jax.jit(lambda x: lax.fori_loop(0, steps, lambda _, x: step(x), x))
        return lambda: run(x)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(24):  # XLA compiles loops of few kernels into one
            x = jnp.cumsum(x)
        return x

    def add(x: jax.Array) -> jax.Array:
        return x + 1

    def work(x: jax.Array) -> jax.Array:
        for _ in range(64):
            x = x * 0.5 + 1
        return x

    sizes = [1 << k for k in (14, 16, 18)]
    calls = {"tiny": loop(chain, 16)}
    calls |= {f"{step.__name__} {n}": loop(step, n) for step in (add, work) for n in sizes}
    least = {name: side.least for name, side in timed(calls, 40).items()}
    begun = sorted(begin for begin, _, name in spans(traced(calls["tiny"])) if name[:5] != "while")
    launch = least["tiny"] / max(1, len(begun))
    profiler = max(0.0, 1e-6 * float(np.median(np.diff(begun))) - launch) if begun else 0.0
    bandwidth = max(8 * steps * n / least[f"add {n}"] for n in sizes)
    peak = max(128 * steps * n / least[f"work {n}"] for n in sizes)
    return Machine(launch, profiler, bandwidth, peak)


def report(shape: Shape, strategy: str, limits: Machine, runs: int, top: int) -> None:
    weight = jax.device_put(jnp.asarray(load_of(shape)))
    compiled = jax.jit(lambda x: plan(x, shape, strategy)).lower(weight).compile()
    kernels = parsed(compiled.as_text() or "")
    untraced = timed({"": lambda: compiled(weight)}, 25)[""]
    tries = [spans(traced(lambda: compiled(weight))) for _ in range(runs)]
    if not all(tries):
        print(f"{strategy}, {shape}: the profiler saw no kernels")
        return
    found = min(tries, key=lambda x: max(e for _, e, _ in x) - min(b for b, _, _ in x))
    loops = {name for name, op in kernels.ops.items() if op.kind in LOOPS}
    seen = Counter(name for _, _, name in found if name not in loops)
    rows: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    dearest = []
    for name, time in shares(found, loops).items():
        known, count = name in kernels.ops, seen[name]
        moved = kernels.bytes(name) / limits.bandwidth if known else 0
        worked = kernels.operations(name) / limits.peak if known else 0
        stage = kernels.stage(name) if known else re.sub(r"[.\d]+$", "", name)
        floors = count * np.array([limits.launch, moved, worked])
        rows[stage] += np.array([time / 1e3, count, *(1e3 * floors)])
        scope = re.search(r'op_name="([^"]*)"', kernels.ops[name].attributes if known else "")
        dearest.append((time, count, stage, name, scope[1][-60:] if scope else ""))

    for row in rows.values():
        row[0] = max(row[0] - 1e3 * limits.profiler * row[1], row[2])
    ordered = dict(sorted(rows.items(), key=lambda x: -x[1][0]))
    ordered["all"] = np.sum([*rows.values()], axis=0)
    plain = f"{1e3 * untraced.steady:.2f} ms, at least {1e3 * untraced.least:.2f}, not profiled"
    table = Table(title=f"{strategy}, {shape}: {plain}", title_justify="left")
    table.add_column("stage")
    for column in ("ms", "share", "kernels", "launches ms", "bytes ms", "operations ms", "x floor"):
        table.add_column(column, justify="right")
    for stage, (time, count, *floors) in ordered.items():
        launches, moved, worked = floors
        cells = [f"{time:.2f}", f"{time / ordered['all'][0]:.1%}", f"{count:.0f}"]
        cells += [*(f"{x:.3f}" for x in floors), f"{time / (launches + max(moved, worked)):.1f}"]
        table.add_row(stage, *cells)
    Console(width=110).print(table)
    for time, count, *names in sorted(dearest, reverse=True)[:top]:
        print(f"    {time:7.0f} us, traced {count:6.0f} x", *names)
    cost: Any = compiled.cost_analysis() or {}
    print(
        f"XLA's analysis, bodies of loops once: {cost.get('bytes accessed', 0) / 1e6:.1f} MB,"
        f" {cost.get('flops', 0) / 1e6:.1f} M operations"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Stages of a plan, beside the machine's limits")
    parser.add_argument("--strategies", nargs="+", default=["greedy", "fast", "auto"])
    parser.add_argument("--shape", choices=[*SHAPES], help="default: v3, and auto for v3-windows")
    parser.add_argument(
        "--runs", type=int, default=5, help="under the profiler; the fastest counts"
    )
    parser.add_argument("--top", type=int, default=0, help="so many of the dearest kernels, too")
    options = parser.parse_args()
    limits = machine()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; a tiny kernel in a loop"
        f" {1e6 * limits.launch:.2f} us, {limits.bandwidth / 1e9:.1f} GB/s,"
        f" {limits.peak / 1e9:.1f} G operations/s"
    )
    cases = [(options.shape or "v3", strategy) for strategy in options.strategies]
    for shape, strategy in cases if options.shape else [*cases, ("v3-windows", "auto")]:
        report(SHAPES[shape], strategy, limits, options.runs, options.top)


if __name__ == "__main__":
    main()
