"""Packing beside torch originals of our strategies: a part of `speed.py`.

An original is a file with `balanced_packing(weight, num_packs)` on torch tensors, named as the
strategy. It runs on the same kind of device and on as many cores as JAX.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Calls, Shape, load_of, timed

import eplb_jax


def beside_originals(shape: Shape, folder: Path, repeat: int) -> list[dict[str, Any]]:
    """`balanced_packing` of every strategy that has a torch original, on the same replicas."""
    import torch

    torch.set_num_threads(cpus())
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    load = load_of(shape)
    replication = eplb_jax.replicate_experts(load, shape.replicas)
    share = (load / np.asarray(replication.logcnt)).astype(np.float32)
    replicas = np.take_along_axis(share, np.asarray(replication.phy2log), axis=1)
    weight, tensor = jax.device_put(jnp.asarray(replicas)), torch.from_numpy(replicas).to(device)

    def original(module: Any) -> Any:
        packing = module.balanced_packing(tensor, shape.gpus)
        if device == "cuda":
            torch.cuda.synchronize()
        return packing

    def imbalance_of(packing: Any) -> float:
        pack_index = np.asarray(
            packing[0] if isinstance(packing[0], jax.Array) else packing[0].cpu()
        )
        items = np.argsort(pack_index, axis=1, kind="stable")
        packed = np.take_along_axis(replicas.astype(float), items, axis=1)
        packs = packed.reshape(shape.layers, shape.gpus, -1).sum(axis=2)
        return float((packs.max(axis=1) / packs.mean(axis=1)).mean() - 1)

    rows = []
    for path in sorted(folder.glob("*.py")):
        if path.stem not in eplb_jax.STRATEGIES:
            continue
        module = imported(path)
        calls: Calls = {
            "ours": lambda name=path.stem: eplb_jax.balanced_packing(
                weight, shape.gpus, strategy=name
            ),
            "original": lambda module=module: original(module),
        }
        times = timed(calls, repeat)
        row: dict[str, Any] = {"shape": str(shape), "packing": path.stem}
        for side, (_, steady, _, packing) in times.items():
            row |= {f"{side}_ms": 1e3 * steady, f"{side}_imbalance": imbalance_of(packing)}
        row["speed_up"] = row["original_ms"] / row["ours_ms"]
        rows.append(row)
    return rows


def imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpus() -> int:
    """The cores that this process may use, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
