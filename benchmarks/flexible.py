"""Next-window imbalance where replicas share the load at hand as it wants.

    python benchmarks/flexible.py

Every window from the 24th on (the 16th of gpt-oss) is measured under a plan from the history of all
windows before it: equal shares; a flexible split of the same plan; and of a plan made for it.
"""

from time import perf_counter

import jax
import numpy as np

import eplb_jax
from eplb_jax import Topology, metrics

ROWS = (
    ("gpt_oss_20b", None, 40, 8, 16),
    ("gpt_oss_20b", None, 48, 8, 16),
    ("deepseek_v2_lite", 0, 72, 8, 24),
    ("deepseek_v2_lite", 0, 80, 16, 24),
    ("deepseek_v2_lite", 0, 96, 16, 24),
    ("deepseek_v2_lite", 0, 80, 40, 24),
)
"""Trace, seed to shuffle its windows, slots, GPUs, first window that is measured."""


def measure(name: str, seed: int | None, slots: int, gpus: int, first: int) -> str:
    """A row of the table, in %; the time is the median of a plan."""
    trace = eplb_jax.loads.example(name)
    if seed is not None:
        trace = np.random.default_rng(seed).permutation(trace)
    topology = Topology.of_replicas(slots, gpus)
    history = eplb_jax.init_history(*trace.shape[1:])
    values, seconds = [], []
    for number, window in enumerate(trace):
        if number >= first:
            even = eplb_jax.plan(history, topology)
            start = perf_counter()
            made = jax.block_until_ready(eplb_jax.plan(history, topology, split="flexible"))
            seconds.append(perf_counter() - start)
            values.append(
                [
                    float(metrics.balance(window, even, topology).mean_imbalance),
                    float(metrics.balance(window, even, topology, split="flexible").mean_imbalance),
                    float(metrics.balance(window, made, topology, split="flexible").mean_imbalance),
                ]
            )
        history = eplb_jax.update_history(history, window)
    mean = 100 * np.mean(values, axis=0)
    order = "in order" if seed is None else "shuffled"
    shown = " | ".join(f"{x:.2f}" for x in mean)
    return f"| {name}, {order} | {slots} / {gpus} | {shown} | {1e3 * np.median(seconds):.0f} |"


if __name__ == "__main__":
    print("| trace | slots / GPUs | equal shares | split | plan for it | ms |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        print(measure(*row), flush=True)
