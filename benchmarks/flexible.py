"""What a flexible split is worth: where replicas share the load at hand as it wants.

    python benchmarks/flexible.py

Three tables. Windows: every one from the 24th on (the 16th of gpt-oss) is measured under a plan
from the history of all windows before it: equal shares; a flexible split of the same plan; and of a
plan made for it. Tokens: batches of gpt-oss-20b through `to_physical`, under plans from the tokens
before them. Known loads: 256 experts on 64 GPUs with a slot to spare on each, plans for this load.
"""

from pathlib import Path
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import root_scalar

import eplb_jax
from eplb_jax import Placement, Topology, metrics, runtime

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
    """A row of the table, in %; the time is that of a plan for equal shares, by medians."""
    trace = eplb_jax.loads.example(name)
    if seed is not None:
        trace = np.random.default_rng(seed).permutation(trace)
    topology = Topology.of_replicas(slots, gpus)
    history = eplb_jax.init_history(*trace.shape[1:])
    values, seconds = [], []

    def timed(split: Literal["flexible"] | None) -> tuple[Placement, float]:
        start = perf_counter()
        plan = jax.block_until_ready(eplb_jax.plan(history, topology, split=split))
        return plan, perf_counter() - start

    for number, window in enumerate(trace):
        if number >= first:
            (even, equal), (made, flexible) = timed(None), timed("flexible")
            seconds.append((equal, flexible))
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
    equal, flexible = np.median(seconds, axis=0)
    return f"| {name}, {order} | {slots} / {gpus} | {shown} | {flexible / equal:.1f} |"


def of_tokens(batch: int, slots: int) -> str:
    """A row of the second table: tokens of the most loaded GPU over the mean, in batches."""
    with np.load(Path(__file__).parent / "tokens.npz") as file:
        ids = file["ids"].astype(np.int32)
    num_experts, half, topology = 32, len(ids) // 2, Topology(8, slots=slots)

    def counts(ids: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(x.ravel(), minlength=num_experts) for x in ids.swapaxes(0, 1)])

    past = np.stack([counts(x) for x in np.split(ids[:half], 8)])
    even, made = (eplb_jax.plan(past, topology, split=x) for x in (None, "flexible"))

    @jax.jit
    def route(ids: jax.Array, plan: Placement, shares: jax.Array | None) -> jax.Array:
        choice = "round_robin" if shares is None else "shares"
        return runtime.to_physical(ids, plan, choice, shares=shares)

    def worst(ids: np.ndarray, plan: Placement, *, split: bool) -> float:
        shares = runtime.split_load(counts(ids), plan, topology) if split else None
        most = []
        for layer in range(ids.shape[1]):
            share = None if shares is None else shares[layer]
            slot = route(jnp.asarray(ids[:, layer]), plan.layer(layer), share)
            tokens = np.bincount(np.asarray(slot).ravel() // slots, minlength=8)
            most.append(tokens.max() / tokens.mean())
        return float(np.mean(most))

    batches = [ids[i : i + batch] for i in range(half, len(ids), batch)]
    ways = (even, False), (even, True), (made, True)
    means = [np.mean([worst(x, plan, split=split) for x in batches]) for plan, split in ways]
    return f"| {8 * slots} / 8 | {batch} | " + " | ".join(f"{x:.3f}" for x in means) + " |"


def of_known_load(skew: float) -> str:
    """A row of the third table; skew is max / mean GPU load with experts in order."""
    rng, num_gpus, topology = np.random.default_rng(0), 64, Topology(64, slots=5)
    popular = rng.normal(size=(8, 256))

    def above(sigma: float) -> float:
        gpu_load = np.exp(sigma * popular).reshape(8, num_gpus, -1).sum(axis=-1)
        return float(np.mean(gpu_load.max(axis=1) / gpu_load.mean(axis=1))) - skew

    load = np.exp(root_scalar(above, bracket=(0, 4)).root * popular)
    load = np.round(load / load.sum(axis=1, keepdims=True) * 4096 * 8 * num_gpus)
    even, made = (eplb_jax.plan(load, topology, split=x) for x in (None, "flexible"))
    values = [
        metrics.balance(load, even, topology),
        metrics.balance(load, even, topology, split="flexible"),
        metrics.balance(load, made, topology, split="flexible"),
    ]
    shown = " | ".join(f"{1 + float(x.mean_imbalance):.3f}" for x in values)
    used = (
        np.sum(
            runtime.split_load(load, made, topology)
            * np.take_along_axis(load, np.asarray(made.phy2log), axis=1)
            >= 1,
            axis=1,
        )
        - 256
    )
    return f"| {skew} | {shown} | {used.mean():.0f} |"


if __name__ == "__main__":
    print("| trace | slots / GPUs | equal shares | split | plan for it | time |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        print(measure(*row), flush=True)
    print("\n| slots / GPUs | tokens in a batch | equal shares | split | plan for it |")
    print("|---|---|---|---|---|")
    for slots in (5, 6):
        for batch in (4096, 512, 128):
            print(of_tokens(batch, slots), flush=True)
    print("\n| skew | equal shares | split | plan for it | replicas used |")
    print("|---|---|---|---|---|")
    for skew in (1.5, 2.0, 3.0):
        print(of_known_load(skew), flush=True)
