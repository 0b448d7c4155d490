"""vllm-ascend, MindIE and verl: maps by device, and MindIE's cumulative counters."""

import json
import re
from typing import Any

import numpy as np

from eplb_jax.formats.sources import Source, open_source
from eplb_jax.formats.types import Format, PlanFile, Recording, logical_load, numbered
from eplb_jax.types import Topology

_COUNTERS = re.compile(r"(decode|prefill)_(\d+)\.csv")


def _is_devices(source: Source) -> bool:
    return source.kind == "json" and "layer_list" in source.keys


def _read_devices(source: Source) -> PlanFile:
    """Devices are read by their position, as vllm-ascend does."""
    rows = source.content["layer_list"]
    devices = [[x["device_expert"] for x in row["device_list"]] for row in rows]
    sizes = {len(experts) for row in devices for experts in row}
    if len(sizes) != 1 or len({len(row) for row in devices}) != 1:
        raise ValueError(f"devices hold {min(sizes)} to {max(sizes)} experts, or differ in number")
    phy2log = np.array(devices)
    for row in rows:
        stated = row.get("device_count", len(devices[0]))
        if stated != len(devices[0]):
            raise ValueError(f"device_count is {stated}, but there are {len(devices[0])} devices")
    layers = tuple(int(row["layer_id"]) for row in rows)
    topology = Topology(phy2log.shape[1], phy2log.shape[2])
    flat = phy2log.reshape(len(rows), -1)
    return PlanFile(flat, layers, int(flat.max()) + 1, topology)


def _layer_list(plan: PlanFile, *, count: bool) -> list[dict[str, Any]]:
    if plan.topology is None:
        raise ValueError("devices are GPUs; give the number of GPUs")
    if plan.phy2log.min() < 0:
        raise ValueError(
            "vllm-ascend, MindIE and verl have an expert in every slot, but some hold -1"
        )
    num_gpus = plan.topology.num_gpus
    by_device = plan.phy2log.reshape(len(plan.layers), num_gpus, plan.topology.slots_per_gpu)
    return [
        {"layer_id": layer}
        | ({"device_count": num_gpus} if count else {})
        | {
            "device_list": [
                {"device_id": i, "device_expert": experts} for i, experts in enumerate(row)
            ]
        }
        for layer, row in zip(plan.layers, by_device.tolist(), strict=True)
    ]


def _write_devices(plan: PlanFile) -> bytes:
    """Layers are numbered from 0 in the file: vllm-ascend looks them up by their position."""
    plan = plan._replace(layers=numbered(len(plan.layers)))
    rows = _layer_list(plan, count=True)
    return json.dumps({"moe_layer_count": len(rows), "layer_list": rows}).encode()


def _write_strategy(plan: PlanFile) -> bytes:
    if plan.phy2log.shape[1] != plan.num_experts:
        raise ValueError(
            f"verl places every expert once, but the plan has {plan.phy2log.shape[1]} slots for "
            f"{plan.num_experts} experts"
        )
    rows = _layer_list(plan, count=False)
    content = {"strategy_version": 1, "moe_layer_count": len(rows), "layer_list": rows}
    return json.dumps(content).encode()


def _is_counters(source: Source) -> bool:
    return source.kind == "folder" and any(_COUNTERS.fullmatch(name) for name in source.content)


def _read_counters(source: Source) -> Recording:
    """Windows are the intervals between samples, of prefill and then of decode."""
    config = {}
    if "model_gen_config.json" in source.content:
        config = open_source(source.content["model_gen_config.json"]).content
    loads, phases = [], []
    physical: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        files = {
            int(match[2]): name
            for name in source.content
            if (match := _COUNTERS.fullmatch(name)) and match[1] == phase
        }
        shared = int(config.get("num_dangling_shared_experts", 0))
        if config.get("enable_dangling_shared_expert"):
            files = {i: name for i, name in files.items() if i >= shared}  # the first devices
        if files:
            columns = [_counts_in(source, files[i]) for i in sorted(files)]
            shapes = {x.shape for x in columns}
            if len(shapes) > 1:
                raise ValueError(f"the files of {phase} have different shapes: {sorted(shapes)}")
            physical[phase] = np.stack(columns, axis=1)  # [rows, devices, slots]
    phy2log, layers = _map_of(source, config, next(iter(physical.values())))
    num_layers, num_experts = len(layers), int(phy2log.max()) + 1
    notes = set()
    for phase, counts in physical.items():
        if len(counts) % num_layers:
            raise ValueError(f"{len(counts)} rows of {phase} for {num_layers} layers")
        samples = counts.reshape(-1, num_layers, counts.shape[1] * counts.shape[2])
        if len(samples) < 2:
            raise ValueError(f"one sample of cumulative counters of {phase}; two give a window")
        change = np.diff(samples, axis=0)
        reset = (change < 0).any(axis=(1, 2))
        if reset.any():
            notes.add(f"{int(reset.sum())} windows of {phase} begin at a reset of the counters")
        change = np.where(reset[:, None, None], samples[1:], change)
        loads.append(logical_load(change, phy2log, num_experts))
        phases += [phase] * len(change)
    load = np.concatenate(loads)
    gpus = next(iter(physical.values())).shape[1]
    return Recording(load, layers, tuple(phases), phy2log, gpus, notes=tuple(sorted(notes)))


def _counts_in(source: Source, name: str) -> np.ndarray:
    content = open_source(source.content[name])
    if content.kind != "table":  # one column
        return np.array([[int(float(x))] for x in content.content.split()])
    return np.array([[int(float(x)) for x in row] for row in content.content])


def _map_of(
    source: Source, config: dict[str, Any], physical: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The map in place: of the file that the configuration names, or experts in order."""
    _, devices, slots = physical.shape
    name = str(config.get("eplb_expert_map_file") or "").rsplit("/", 1)[-1]
    if name in source.content:
        plan = _read_devices(open_source(source.content[name]))
        if plan.phy2log.shape[1] != devices * slots:
            raise ValueError(
                f"{name} has {plan.phy2log.shape[1]} slots, the counters {devices * slots}"
            )
        return plan.phy2log, plan.layers
    experts, layers = config.get("num_of_experts"), config.get("num_moe_layers")
    if layers is None:
        raise ValueError("model_gen_config.json with num_moe_layers must be in the folder")
    if experts is not None and int(experts) != devices * slots:
        raise ValueError(
            f"{devices} devices of {slots} slots for {experts} experts: which expert is in which "
            "slot is not known; put the file that eplb_expert_map_file names into the folder"
        )
    return np.tile(np.arange(devices * slots), (int(layers), 1)), numbered(int(layers))


def _is_verl_load(source: Source) -> bool:
    return source.kind == "json" and {"history_loads", "num_experts"} <= source.keys


def _read_verl_load(source: Source) -> Recording:
    """Windows are steps; what is missing is 0."""
    steps, num_experts = source.content["history_loads"], int(source.content["num_experts"])
    layers = sorted({int(layer) for step in steps for layer in step})
    load = np.zeros((len(steps), len(layers), num_experts), np.int64)
    for window, step in zip(load, steps, strict=True):
        for layer, counts in step.items():
            for expert, count in counts.items():
                window[layers.index(int(layer)), int(expert)] = count
    return Recording(load, tuple(layers))


FORMATS = (
    Format(
        "ascend",
        "vllm-ascend's expert_map_path, MindIE's deployment",
        lambda source: _is_devices(source) and "strategy_version" not in source.keys,
        read_plan=_read_devices,
        write_plan=_write_devices,
    ),
    Format(
        "mindie",
        "MindIE's cumulative counters, a folder of prefill_0.csv or decode_0.csv",
        _is_counters,
        _read_counters,
    ),
    Format("verl-load", "verl's load.json", _is_verl_load, _read_verl_load),
    Format(
        "verl",
        "verl's strategy.json",
        lambda source: _is_devices(source) and "strategy_version" in source.keys,
        read_plan=_read_devices,
        write_plan=_write_strategy,
    ),
)
