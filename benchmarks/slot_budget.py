"""Held-out time against spare slots in total: uniform, CRAFT's published rule, and `spread_slots`.

    python benchmarks/slot_budget.py            # five minutes, most of it compilation

The windows of a trace are halved at random. Budgets and plans come from one half, time from the
other, and the other way round; the time lost is the sum over layers and windows of the tokens of
the most loaded GPU, over that of the mean GPU, minus 1. DeepSeek-V3 has two windows: as they are,
and with the tokens of both in random halves, which is traffic that does not change. CRAFT judges
layers by the windows that its plans are made from, and has one total for a trace; "scaled" is its
rule with thresholds for another total, and its padding for what is left.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

import eplb_jax
from eplb_jax import Topology, metrics

TRACES = (
    ("deepseek_v3_0324", True, Topology(32, slots=12)),
    ("deepseek_v3_0324", False, Topology(32, slots=12)),
    ("deepseek_v2_lite", False, Topology(8, slots=12)),
    ("gpt_oss_20b", False, Topology(8, slots=8)),
)
"""Trace, whether its tokens are halved and not its windows, and GPUs."""

PER_GPU = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2)
"""Spare slots of a GPU and layer, on average."""

SPLITS = 10
"""Number of ways in which windows or tokens are halved."""

SIZES = (4, 8, 16, 32)
"""Replicas that CRAFT gives a layer, if any."""


def craft(
    curve: np.ndarray, mean: np.ndarray, num_gpus: int, total: int | None = None
) -> np.ndarray:
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


def halves_of(trace: np.ndarray, by_token: bool) -> list[Half]:
    """Random halves of the windows, or of the tokens, each in both roles."""
    found = []
    for seed in range(SPLITS if by_token or len(trace) > 2 else 1):
        rng = np.random.default_rng(seed)
        if by_token:
            total = trace.sum(axis=0)
            one = rng.binomial(total, 0.5)
            parts = one[None], (total - one)[None]
        else:
            order = rng.permutation(len(trace))
            parts = [trace[np.sort(order[k::2])] for k in (0, 1)]
        found += [Half(*parts), Half(*parts[::-1])]
    return found


def budget(half: Half, by_token: bool, topology: Topology, total: int) -> np.ndarray:
    """Spares of every layer by `spread_slots`."""
    load, judged = half.seen, None
    if by_token:
        load = np.random.default_rng(0).binomial(half.seen, 0.5)
        judged = half.seen - load
    elif len(load) == 1:
        # No part is left to judge by. The plan of the other window is judged by this one, and then
        # this one's by the other.
        load, judged = half.unseen, half.seen
    return eplb_jax.spread_slots(load, judged, topology, total).spares


def uniform(total: int, num_layers: int) -> np.ndarray:
    """The same spares in every layer; one more in the first ones where it cannot be."""
    return total // num_layers + (np.arange(num_layers) < total % num_layers)


def saved(totals: list[int], ours: np.ndarray, wanted: float) -> float:
    """The least total with which our time is as low as wanted, between totals by interpolation."""
    best = np.minimum.accumulate(ours)
    first = int(np.argmax(best <= wanted)) if best[-1] <= wanted else -1
    if first <= 0:
        return np.nan if first else 0.0
    part = (best[first - 1] - wanted) / (best[first - 1] - best[first])
    return totals[first - 1] + part * (totals[first] - totals[first - 1])


def measure(name: str, by_token: bool, topology: Topology) -> None:
    """Print the table of a trace."""
    trace = eplb_jax.loads.example(name)
    num_layers, num_gpus = trace.shape[1], topology.num_gpus
    halves = halves_of(trace, by_token)
    totals = [round(x * num_gpus * num_layers) for x in PER_GPU]
    rules = []
    for half in halves:
        curve = np.asarray(eplb_jax.slots_curve(half.seen, half.seen, topology, max(SIZES)))
        mean = half.seen.sum(axis=2).mean(axis=0) / num_gpus
        rules.append(partial(craft, curve, mean, num_gpus))

    def lost(spares: list[np.ndarray]) -> np.ndarray:
        return np.array([x.lost(y, topology) for x, y in zip(halves, spares, strict=True)])

    print(f"\n{name}{', halves of tokens' * by_token}, {num_gpus} GPUs\n")
    print("| spares of a GPU and layer | uniform | CRAFT, scaled | `spread_slots` | less | saved |")
    print("|---|---|---|---|---|---|")
    sides = (
        lambda x: lost([uniform(x, num_layers)] * len(halves)),
        lambda x: lost([y(x) for y in rules]),
        lambda x: lost([budget(y, by_token, topology, x) for y in halves]),
    )
    table = np.array([[side(x) for side in sides] for x in totals])  # [totals, sides, halves]
    mean = table.mean(axis=2)
    for row, total, per_gpu in zip(table, totals, PER_GPU, strict=True):
        less = row[0] - row[2]
        error = f" +- {less.std(ddof=1) / len(less) ** 0.5:.2f}" if len(less) > 2 else ""
        needed = saved(totals, mean[:, 2], row[0].mean())
        part = f"{1 - needed / total:.0%}" if total and np.isfinite(needed) else "-"
        times = " | ".join(f"{x:.2f}" for x in row.mean(axis=1))
        print(f"| {per_gpu:g} | {times} | {less.mean():.2f}{error} | {part} |", flush=True)
    published = [x() for x in rules]
    ours = [
        budget(x, by_token, topology, int(y.sum())) for x, y in zip(halves, published, strict=True)
    ]
    per_gpu = np.mean([x.sum() for x in published]) / num_gpus / num_layers
    print(
        f"\nCRAFT as published: {per_gpu:.2f} spares of a GPU and layer, "
        f"{lost(published).mean():.2f} %; `spread_slots` with as many: {lost(ours).mean():.2f} %",
        flush=True,
    )


if __name__ == "__main__":
    for case in TRACES:
        measure(*case)
