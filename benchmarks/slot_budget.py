"""Held-out time against spare slots in total: uniform, CRAFT's published rule, and `spread_slots`.

    python benchmarks/slot_budget.py            # five minutes, most of it compilation

The windows of a trace are halved, even and odd ones. Budgets and plans come from one half, time
from the other, and the other way round; the time lost is the sum over layers and windows of the
tokens of the most loaded GPU, over that of the mean GPU, minus 1. CRAFT judges layers by the
windows that its plans are made from; it has one total for a trace. `scaled` is its rule with
thresholds that reach another total, and its padding for what is left.
"""

from typing import NamedTuple

import numpy as np

import eplb_jax
from eplb_jax import Topology, metrics

TRACES = (
    ("deepseek_v3_0324", Topology(32, slots=12)),
    ("deepseek_v2_lite", Topology(8, slots=12)),
    ("gpt_oss_20b", Topology(8, slots=8)),
)
PER_GPU = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2)
"""Spare slots of a GPU and layer, on average."""

SPLITS = 10
"""Number of ways in which the windows are halved."""

SIZES = (4, 8, 16, 32)
"""Replicas that CRAFT gives a layer, if any."""


def craft(curve: np.ndarray, mean: np.ndarray, num_gpus: int, total: int | None) -> np.ndarray:
    """Spares of every layer by CRAFT's rule (Accelsnow/CRAFT_core at be4cb7a).

    A layer gets the largest size whose benefit per replica is at least the average over layers and
    sizes; up to 16 also for half of that; else up to 16 by the largest benefit. With `total`, of
    the averages' multiples the least that fits it.
    """
    sizes = np.array(SIZES)
    balancedness = mean[:, None] / curve
    benefit = (balancedness[:, sizes] - balancedness[:, :1]) / sizes
    factors = (1.0,) if total is None else np.geomspace(1e-3, 1e3, 400)
    for factor in factors:
        bar = benefit.mean() * factor
        spares = np.array([_craft_of_layer(x, bar) for x in benefit])
        if total is None or spares.sum() <= total:
            break
    else:
        spares = np.zeros(len(mean), int)
    wanted = -(-spares.sum() // num_gpus) * num_gpus if total is None else total
    while (left := wanted - spares.sum()) > 0:
        least = spares.argmin()
        spares[least] += min(max(spares[least], 1), left)
    return spares


def _craft_of_layer(benefit: np.ndarray, bar: float) -> int:
    chosen, most, high = 0, 0.0, False
    for size, gain in zip(SIZES, benefit, strict=True):
        if not high and size <= 16:
            if gain >= bar / 2:
                chosen = size
            elif gain > most:
                chosen, most = size, gain
        if gain >= bar:
            chosen, high = size, True
    return chosen


def time_lost(windows: np.ndarray, plan: eplb_jax.Placement, topology: Topology) -> float:
    """Tokens of the most loaded GPUs over those of mean ones, minus 1, in %."""
    loads = np.asarray(metrics.gpu_loads(windows, plan, topology), np.float64)
    return 100 * float(loads.max(axis=-1).sum() / loads.mean(axis=-1).sum() - 1)


class Half(NamedTuple):
    """What is planned from, and what is measured."""

    seen: np.ndarray
    unseen: np.ndarray

    def lost(self, spares: np.ndarray, topology: Topology) -> float:
        """Time lost with so many spares in every layer."""
        return time_lost(self.unseen, eplb_jax.plan_layers(self.seen, topology, spares), topology)


def halves_of(trace: np.ndarray) -> list[Half]:
    """Random halves of the windows, each in both roles."""
    orders = [np.random.default_rng(i).permutation(len(trace)) for i in range(SPLITS)]
    orders = orders if len(trace) > 2 else orders[:1]
    parts = [np.sort(x[k::2]) for x in orders for k in (0, 1)]
    return [Half(trace[x], np.delete(trace, x, axis=0)) for x in parts]


def uniform(total: int, num_layers: int) -> np.ndarray:
    """The same spares in every layer; one more in the first ones where it cannot be."""
    return total // num_layers + (np.arange(num_layers) < total % num_layers)


def measure(name: str, topology: Topology) -> None:
    """Print the table of a trace."""
    trace = eplb_jax.loads.example(name)
    num_layers, num_gpus = trace.shape[1], topology.num_gpus
    halves = halves_of(trace)
    totals = [round(x * num_gpus * num_layers) for x in PER_GPU]
    curves = [
        (np.asarray(eplb_jax.slots_curve(x.seen, x.seen, topology, max(SIZES))), x.seen)
        for x in halves
    ]
    rules = [(x, y.sum(axis=2).mean(axis=0) / num_gpus, num_gpus) for x, y in curves]
    published = [craft(*x, None) for x in rules]

    def ours(half: Half, total: int) -> np.ndarray:
        # Of one window no part is left to judge by: the plan of the other window is judged by it.
        load, judged = (half.seen, None) if len(half.seen) > 1 else half[::-1]
        return eplb_jax.spread_slots(load, judged, topology, total).spares

    print(f"\n{name}, {trace.shape[2]} experts on {num_gpus} GPUs, {num_layers} layers\n")
    print("| spares of a GPU and layer | uniform | CRAFT, scaled | `spread_slots` | slots saved |")
    print("|---|---|---|---|---|")
    rows = []
    for total in totals:
        row = [np.mean([x.lost(uniform(total, num_layers), topology) for x in halves])]
        scaled = [craft(*x, total) for x in rules]
        row.append(np.mean([x.lost(y, topology) for x, y in zip(halves, scaled, strict=True)]))
        row.append(np.mean([x.lost(ours(x, total), topology) for x in halves]))
        rows.append(row)
    for total, per_gpu, row in zip(totals, PER_GPU, rows, strict=True):
        enough = [x for x, y in zip(totals, rows, strict=True) if y[2] <= row[0]]
        saved = f"{1 - min(enough) / total:.0%}" if enough and total else "-"
        print(f"| {per_gpu:g} | {' | '.join(f'{x:.2f}' for x in row)} | {saved} |", flush=True)
    lost = [x.lost(y, topology) for x, y in zip(halves, published, strict=True)]
    spent = [y.sum() for y in published]
    same = [x.lost(ours(x, int(y)), topology) for x, y in zip(halves, spent, strict=True)]
    per_gpu = np.mean(spent) / num_gpus / num_layers
    print(f"\nCRAFT as published: {per_gpu:.2f} spares of a GPU and layer, {np.mean(lost):.2f} %; ")
    print(f"`spread_slots` with as many: {np.mean(same):.2f} %", flush=True)


if __name__ == "__main__":
    for case in TRACES:
        measure(*case)
