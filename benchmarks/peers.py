"""What others run, restated from the description of the algorithm: the sides of `speed.py`.

    python benchmarks/peers.py    # checks that all of them make the plan of strategy="greedy"

All follow DeepSeek's global policy: every spare slot goes to the largest load per replica, then
replicas in descending order go to the least loaded GPU with room. They differ in what they run on.
`log2phy` is [L, E, R - E + 1] padded with -1, as ours is.
"""

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Maps = tuple[Any, Any, Any]
Peer = Callable[[np.ndarray, int, int], Maps]


def deepseek_torch(weight: np.ndarray, num_replicas: int, num_gpus: int) -> Maps:
    """As DeepSeek's eplb.py: replication over all layers at once, packing item by item."""
    import torch

    load = torch.from_numpy(weight)
    num_layers, num_experts = load.shape
    capacity = num_replicas // num_gpus
    rows = torch.arange(num_layers)
    logcnt = torch.ones(load.shape, dtype=torch.int64)
    expert = torch.arange(num_replicas).repeat(num_layers, 1)
    rank = torch.zeros_like(expert)
    for spare in range(num_experts, num_replicas):
        hottest = (load / logcnt).argmax(dim=1)
        expert[:, spare] = hottest
        rank[:, spare] = logcnt[rows, hottest]
        logcnt[rows, hottest] += 1

    share = (load / logcnt).gather(1, expert)
    falling = share.sort(dim=1, descending=True, stable=True).indices
    slot = torch.empty_like(expert)
    for layer in range(num_layers):
        loads: list[Any] = [0] * num_gpus  # tensors without axes from the first item on
        held = [0] * num_gpus
        for item in falling[layer]:
            free = (gpu for gpu in range(num_gpus) if held[gpu] < capacity)
            gpu = min(free, key=lambda gpu: loads[gpu])
            slot[layer, item] = gpu * capacity + held[gpu]
            loads[gpu] += share[layer, item]
            held[gpu] += 1

    phy2log = torch.empty_like(expert).scatter_(1, slot, expert)
    most = num_replicas - num_experts + 1
    log2phy = torch.full((num_layers, num_experts * most), -1)
    log2phy.scatter_(1, expert * most + rank, slot)
    return phy2log, log2phy.view(num_layers, num_experts, most), logcnt


def batched_numpy(weight: np.ndarray, num_replicas: int, num_gpus: int) -> Maps:
    """In NumPy, item by item over all layers at once."""
    num_layers, num_experts = weight.shape
    capacity = num_replicas // num_gpus
    rows = np.arange(num_layers)
    logcnt = np.ones(weight.shape, np.int32)
    expert = np.tile(np.arange(num_replicas, dtype=np.int32), (num_layers, 1))
    rank = np.zeros_like(expert)
    share = weight.copy()
    for spare in range(num_experts, num_replicas):
        hottest = share.argmax(axis=1)
        expert[:, spare] = hottest
        rank[:, spare] = logcnt[rows, hottest]
        logcnt[rows, hottest] += 1
        share[rows, hottest] = weight[rows, hottest] / logcnt[rows, hottest].astype(np.float32)

    per_slot = np.take_along_axis(share, expert, axis=1)
    falling = np.argsort(-per_slot, axis=1, kind="stable")
    loads = np.zeros((num_layers, num_gpus), np.float32)
    held = np.zeros((num_layers, num_gpus), np.int32)
    slot = np.empty_like(expert)
    for item in falling.T:
        gpu = loads.argmin(axis=1)
        slot[rows, item] = gpu * capacity + held[rows, gpu]
        loads[rows, gpu] += per_slot[rows, item]
        held[rows, gpu] += 1
        loads[rows, gpu] = np.where(held[rows, gpu] < capacity, loads[rows, gpu], np.inf)

    phy2log = np.empty_like(expert)
    phy2log[rows[:, None], slot] = expert
    log2phy = np.full((num_layers, num_experts, num_replicas - num_experts + 1), -1, np.int32)
    log2phy[rows[:, None], expert, rank] = slot
    return phy2log, log2phy, logcnt


def heap_lpt(weight: np.ndarray, num_replicas: int, num_gpus: int) -> Maps:
    """In C++ with heaps, layer by layer, on one core: `heap_lpt.cpp`."""
    library = heap_library()
    assert library is not None, "no C++ compiler"
    num_layers, num_experts = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    phy2log = np.empty((num_layers, num_replicas), np.int32)
    log2phy = np.empty((num_layers, num_experts, num_replicas - num_experts + 1), np.int32)
    logcnt = np.empty((num_layers, num_experts), np.int32)
    arrays = [x.ctypes.data_as(ctypes.c_void_p) for x in (weight, phy2log, log2phy, logcnt)]
    library.plan(arrays[0], num_layers, num_experts, num_replicas, num_gpus, *arrays[1:])
    return phy2log, log2phy, logcnt


@functools.cache
def heap_library() -> ctypes.CDLL | None:
    """`heap_lpt.cpp` compiled for this machine; None without a compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    source = Path(__file__).with_name("heap_lpt.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "heap_lpt.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


def available() -> dict[str, Peer]:
    """Those that this machine can run, by name."""
    found: dict[str, Peer] = {}
    if heap_library() is not None:
        found["heap_lpt"] = heap_lpt
    found["batched_numpy"] = batched_numpy
    if importlib.util.find_spec("torch") is not None:
        found["deepseek_torch"] = deepseek_torch
    return found


def imbalance(load: np.ndarray, phy2log: np.ndarray, num_gpus: int) -> np.ndarray:
    """Heaviest GPU / mean GPU - 1 of every layer, in float64; [T, L, E] gives [T, L]."""
    logcnt = np.stack([np.bincount(x, minlength=load.shape[-1]) for x in phy2log])
    slots = np.broadcast_to(phy2log, (*load.shape[:-1], phy2log.shape[-1]))
    per_slot = np.take_along_axis(load / logcnt, slots, axis=-1)
    gpus = per_slot.reshape(*load.shape[:-1], num_gpus, -1).sum(axis=-1)
    return gpus.max(axis=-1) / gpus.mean(axis=-1) - 1


def duplicates(phy2log: np.ndarray, num_gpus: int) -> int:
    """How many slots hold an expert that another slot of their GPU holds."""
    by_gpu = np.sort(phy2log.reshape(len(phy2log), num_gpus, -1), axis=2)
    return int((by_gpu[:, :, 1:] == by_gpu[:, :, :-1]).sum())


def check_equal(load: np.ndarray, plans: dict[str, np.ndarray], num_gpus: int) -> None:
    """Raise unless every layer of every phy2log is balanced as that of the first one."""
    (first, expected), *others = (
        (name, imbalance(load, phy2log, num_gpus)) for name, phy2log in plans.items()
    )
    for name, found in others:
        if not np.allclose(found, expected, rtol=1e-3, atol=1e-6):
            worst = int(np.abs(found - expected).argmax())
            raise AssertionError(
                f"layer {worst}: {name} is off by {found[worst]}, {first} by {expected[worst]}"
            )


def main() -> None:
    import jax.numpy as jnp

    import eplb_jax

    load = np.asarray(eplb_jax.loads.example().sum(axis=0), np.float32)
    for num_replicas, num_gpus in ((288, 32), (320, 64), (288, 144), (256, 32)):
        ours = eplb_jax.rebalance_experts(
            load, num_replicas, 1, 1, num_gpus, policy="global", strategy="greedy"
        )
        plans = {"greedy": np.asarray(ours.phy2log)}
        for name, peer in available().items():
            maps = (jnp.asarray(np.asarray(x)) for x in peer(load, num_replicas, num_gpus))
            plan = eplb_jax.Placement(*maps)
            eplb_jax.check_placement(plan)
            plans[name] = np.asarray(plan.phy2log)
        check_equal(load, plans, num_gpus)
        same = [name for name, x in plans.items() if np.array_equal(x, plans["greedy"])]
        known = f"{num_replicas} / {num_gpus}: balanced as greedy: {', '.join(plans)}"
        print(f"{known}; slot for slot: {', '.join(same)}")


if __name__ == "__main__":
    main()
