"""The time of steps under plans for tokens and for time.

    python benchmarks/step_time.py

Steps of gpt-oss-20b, routed token by token: plans from the first half of the tokens, steps from the
second. The time is that of the GPU that takes most, in units of that without a balancer, mean over
layers and steps; replicas take tokens in turn. Three costs: reads of weights only, tokens only, and
both, which then take the same time with the mean number of tokens. "tiles" are of 128 tokens.
"""

from pathlib import Path

import numpy as np

import eplb_jax
from eplb_jax import Cost, Topology

EXPERTS, STEPS = 32, 24


def counts(ids: np.ndarray) -> np.ndarray:
    """Tokens of every expert in every layer, [L, E]."""
    return np.stack([np.bincount(x.ravel(), minlength=EXPERTS) for x in ids.swapaxes(0, 1)])


def seconds(load: np.ndarray, phy2log: np.ndarray, num_gpus: int, cost: Cost) -> float:
    """The time of a step."""
    most = []
    for tokens, slots in zip(load, phy2log, strict=True):
        held, earlier = slots >= 0, np.tri(slots.size, k=-1)
        rank = np.sum((slots[:, None] == slots[None]) * earlier, axis=1)
        count = np.maximum(np.bincount(slots[held], minlength=EXPERTS), 1)[slots]
        mine = np.where(held, tokens[slots] // count + (rank < tokens[slots] % count), 0)
        time = cost.per_active_expert * (mine > 0)
        time = time + cost.per_token * np.ceil(mine / cost.tile) * cost.tile
        most.append(time.reshape(num_gpus, -1).sum(axis=1).max())
    return float(np.mean(most))


def measure(num_gpus: int, slots: int, batch: int, name: str) -> str:
    """A row of the table."""
    with np.load(Path(__file__).parent / "tokens.npz") as file:
        ids = file["ids"]
    half = len(ids) // 2
    past = np.stack([counts(x) for x in np.split(ids[:half], 8)])
    first = np.linspace(half, len(ids) - batch, STEPS).astype(int)
    steps = [counts(ids[i : i + batch]) for i in first]
    routed = batch * ids.shape[2]
    cost = {
        "reads": Cost(0, 1, tokens_per_step=routed),
        "both": Cost(1, routed / EXPERTS, tokens_per_step=routed),
        "tokens": Cost(1, 0, tokens_per_step=routed),
        "tiles": Cost(1, 0, 128, tokens_per_step=routed),
    }[name]
    topology, alone = Topology(num_gpus, slots=slots), Topology(num_gpus, EXPERTS // num_gpus)
    order = np.tile(np.arange(EXPERTS), (ids.shape[1], 1))
    plans = {
        "DeepSeek": eplb_jax.plan(past.sum(axis=0), topology, strategy="greedy"),
        "auto": eplb_jax.plan(past, topology),
        "no replicas": eplb_jax.plan(past, alone),
        "for the cost": eplb_jax.plan(past, topology, cost=cost),
    }

    def mean(phy2log: np.ndarray) -> float:
        return float(np.mean([seconds(x, phy2log, num_gpus, cost) for x in steps]))

    base = mean(order)
    shown = " | ".join(f"{mean(np.asarray(x.phy2log)) / base:.3f}" for x in plans.values())
    used = np.mean(np.sum(np.asarray(plans["for the cost"].phy2log) >= 0, axis=1)) - EXPERTS
    spares = topology.num_replicas - EXPERTS
    return f"| {num_gpus} | {batch} | {name} | {shown} | {used:.1f} of {spares} |"


if __name__ == "__main__":
    print(
        "| GPUs | tokens | cost | DeepSeek | auto | auto, no spares | for the cost | spares used |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for num_gpus, slots in ((8, 5), (8, 6), (16, 3)):
        for batch in (32, 128, 512):
            for name in ("reads", "both", "tokens"):
                print(measure(num_gpus, slots, batch, name), flush=True)
    for batch in (512, 2048):
        print(measure(8, 6, batch, "tiles"), flush=True)
