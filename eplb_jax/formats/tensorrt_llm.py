"""TensorRT-LLM: expert statistics, and the load balancer's configuration."""

import re
from typing import Any

import numpy as np

from eplb_jax.formats.sources import Source, open_source
from eplb_jax.formats.types import Format, PlanFile, Recording
from eplb_jax.types import Topology

_RANK = re.compile(r"rank(\d+)\.safetensors")
_ASSIGNMENTS = "initial_global_assignments"


def _is_statistics(source: Source) -> bool:
    return source.kind == "folder" and any(_RANK.fullmatch(name) for name in source.content)


def _read_statistics(source: Source) -> Recording:
    """Windows are iterations; the files of all ranks are added up."""
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError:
        raise ValueError("this needs safetensors: pip install 'eplb-jax[cli]'") from None
    names = sorted(name for name in source.content if _RANK.fullmatch(name))
    counts: dict[tuple[int, int], np.ndarray] = {}
    seen: dict[tuple[int, int], int] = {}
    for name in names:
        for key, value in load_file(source.content[name]).items():
            iteration, layer = map(int, key.split("_"))
            place = iteration, layer
            counts[place] = counts.get(place, 0) + value.astype(np.int64)
            seen[place] = seen.get(place, 0) + 1
    if not counts:
        raise ValueError(f"{', '.join(names)} have no counts")
    iterations, layers = (sorted({x[i] for x in counts}) for i in (0, 1))
    num_experts = len(next(iter(counts.values())))
    load = np.zeros((len(iterations), len(layers), num_experts), np.int64)
    for (iteration, layer), count in counts.items():
        load[iterations.index(iteration), layers.index(layer)] = count
    some = sum(x < len(names) for x in seen.values()) + load[:, :, 0].size - len(counts)
    notes = (f"{some} counts of an iteration and layer are not in the files of all ranks",)
    meta = {}
    if "meta_info.json" in source.content:
        meta = open_source(source.content["meta_info.json"]).content
    if meta.get("num_experts", num_experts) != num_experts:
        raise ValueError(f"counts of {num_experts} experts, but meta_info.json has {meta}")
    return Recording(load, tuple(layers), notes=notes if some else ())


def _is_configuration(source: Source) -> bool:
    return (
        source.kind in ("yaml", "json")
        and _ASSIGNMENTS in source.keys
        and ("record_type" not in source.keys)
    )


def _read_configuration(source: Source) -> PlanFile:
    rows: dict[Any, list[int]] = source.content[_ASSIGNMENTS]
    layers = sorted(rows, key=int)
    phy2log = np.array([rows[x] for x in layers])
    num_slots = int(source.content["num_slots"])
    if phy2log.shape[1:] != (num_slots,):
        raise ValueError(f"num_slots is {num_slots}, but the map has {phy2log.shape[1:]}")
    num_gpus = source.content.get("ep_size")
    topology = None if num_gpus is None else Topology.of_replicas(num_slots, int(num_gpus))
    return PlanFile(phy2log, tuple(map(int, layers)), int(phy2log.max()) + 1, topology)


def _write_configuration(plan: PlanFile) -> bytes:
    if plan.phy2log.min() < 0:
        raise ValueError("TensorRT-LLM has an expert in every slot, but some hold -1")
    # YAML by hand, as JSON lists are YAML: one line a layer, and integers as keys.
    lines = [f"num_slots: {plan.phy2log.shape[1]}"]
    if plan.topology is not None:
        lines.append(f"ep_size: {plan.topology.num_gpus}")
    lines.append(f"{_ASSIGNMENTS}:")
    rows = zip(plan.layers, plan.phy2log.tolist(), strict=True)
    lines += [f"  {layer}: {row}" for layer, row in rows]
    lines.append("layer_updates_per_iter: 0")
    return ("\n".join(lines) + "\n").encode()


FORMATS = (
    Format(
        "tensorrt-llm-statistics",
        "TensorRT-LLM's EXPERT_STATISTIC_PATH, a folder",
        _is_statistics,
        _read_statistics,
    ),
    Format(
        "tensorrt-llm",
        "TensorRT-LLM's load balancer configuration, YAML",
        _is_configuration,
        read_plan=_read_configuration,
        write_plan=_write_configuration,
    ),
)
