"""vLLM: statistics and mappings of its pending changes, and its log lines."""

import json
import re
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eplb_jax.formats.sources import Source
from eplb_jax.formats.types import Format, PlanFile, Recording, logical_load, numbered
from eplb_jax.types import Topology

_STATS, _MAPPING = "eplb_load_stats", "eplb_initial_mapping"
_LINE = re.compile(
    r"EPLB step: (?P<step>\d+) for model (?P<model>\S+): avg_tokens=(?P<mean>[\d.]+), "
    r"max_tokens=(?P<most>[\d.]+), balancedness=(?P<balancedness>[\d.]+)"
)


class LogLines(NamedTuple):
    """What vLLM's log says of balance, one entry for every line "EPLB step".

    Attributes:
        model: Name of the model.
        step: Number of the step.
        mean: Mean tokens of a GPU, summed over layers.
        most: Maximum tokens of a GPU, summed over layers.
        balancedness: mean / most, as logged.
    """

    model: tuple[str, ...]
    step: Int[np.ndarray, " n"]
    mean: Float[np.ndarray, " n"]
    most: Float[np.ndarray, " n"]
    balancedness: Float[np.ndarray, " n"]


def read_log(text: str) -> LogLines:
    """The lines "EPLB step" of a log of vLLM; others are skipped.

    Example:
        >>> line = "EPLB step: 12 for model m: avg_tokens=812.00, max_tokens=900, balancedness=0.90"
        >>> read_log(line).most.tolist()
        [900.0]
    """
    found = list(_LINE.finditer(text))
    columns = [np.array([float(x[k]) for x in found]) for k in ("mean", "most", "balancedness")]
    steps = np.array([int(x["step"]) for x in found], np.int64)
    return LogLines(tuple(x["model"] for x in found), steps, *columns)


def _is_log(source: Source) -> bool:
    return source.kind == "text" and _LINE.search(source.content) is not None


def _refuse_log(source: Source) -> Recording:
    lines = read_log(source.content)
    raise ValueError(
        f"{len(lines.step)} lines of a log, mean balancedness {lines.balancedness.mean():.4f}; "
        "they do not say which expert got how many tokens, so nothing can be planned from them"
    )


def _records(source: Source) -> list[dict[str, Any]]:
    """The records of a JSONL file, or the only one of a JSON file."""
    content = source.content if source.kind == "jsonl" else [source.content]
    return [x for x in content if isinstance(x, dict)] if source.kind in ("json", "jsonl") else []


def _is_stats(source: Source) -> bool:
    return any(x.get("record_type") in (_STATS, _MAPPING) for x in _records(source))


def _read_stats(source: Source) -> Recording:
    """Windows are records; each is read through its own map."""
    records = [x for x in _records(source) if x.get("record_type") == _STATS]
    if not records:
        raise ValueError(f"it has no record of type {_STATS}")
    phy2log = [np.asarray(x["p2l_map"]) for x in records]
    num_experts = 1 + max(int(x.max()) for x in phy2log)
    physical = (np.asarray(x["expert_load"]) for x in records)
    load = [
        logical_load(x[None], m, num_experts)[0] for x, m in zip(physical, phy2log, strict=True)
    ]
    last = records[-1]
    return Recording(
        np.stack(load), numbered(load[0].shape[0]), (), phy2log[-1], int(last["num_ranks"])
    )


def _read_mapping(source: Source) -> PlanFile:
    records = _records(source)
    mappings = [x for x in records if x.get("record_type") == _MAPPING]
    if not mappings:
        found = _read_stats(source)
        assert found.phy2log is not None
        assert found.num_gpus is not None
        topology = Topology.of_replicas(found.phy2log.shape[1], found.num_gpus)
        return PlanFile(found.phy2log, found.layers, found.load.shape[2], topology)
    if len(mappings) > 1:
        raise ValueError(f"it has {len(mappings)} mappings; keep one")
    rows = mappings[0]["initial_global_assignments"]
    layers = sorted(map(int, rows))
    phy2log = np.array([rows[str(x)] for x in layers])
    num_experts = int(mappings[0]["num_slots"]) - int(mappings[0]["num_redundant_experts"])
    return PlanFile(phy2log, tuple(layers), num_experts)


def _write_mapping(plan: PlanFile) -> bytes:
    _complete(plan)
    num_slots = plan.phy2log.shape[1]
    rows = zip(plan.layers, plan.phy2log.tolist(), strict=True)
    content = {
        "record_type": _MAPPING,
        "version": 1,
        "num_redundant_experts": num_slots - plan.num_experts,
        "num_slots": num_slots,
        "initial_global_assignments": {str(layer): row for layer, row in rows},
    }
    return (json.dumps(content) + "\n").encode()


def _is_list(source: Source) -> bool:
    rows = source.content
    if source.kind != "json" or not isinstance(rows, list) or not rows:
        return False
    return isinstance(rows[0], int) or (isinstance(rows[0], list) and isinstance(rows[0][0], int))


def _read_list(source: Source) -> PlanFile:
    phy2log = np.atleast_2d(np.array(source.content))
    notes = ("one map, for all layers",) if np.ndim(source.content) == 1 else ()
    return PlanFile(phy2log, numbered(len(phy2log)), int(phy2log.max()) + 1, notes=notes)


def _write_list(plan: PlanFile) -> bytes:
    _complete(plan)
    return json.dumps(plan.phy2log.tolist()).encode()


def _is_models(source: Source) -> bool:
    return source.kind == "json" and "model_maps" in source.keys


def _read_models(source: Source) -> PlanFile:
    maps = source.content["model_maps"]
    if len(maps) != 1:
        raise ValueError(
            f"it has the maps of {len(maps)} models: {', '.join(maps)}; keep one of them"
        )
    phy2log = np.asarray(next(iter(maps.values()))["physical_to_logical_map"])
    return PlanFile(phy2log, numbered(len(phy2log)), int(phy2log.max()) + 1)


def _is_local(source: Source) -> bool:
    content = source.content
    if source.kind != "torch" or not isinstance(content, np.ndarray) or content.ndim != 3:
        return False
    return content.dtype == np.int32 and bool(content.min() == -1)


def _read_local(source: Source) -> PlanFile:
    """From the local slot of every expert on every GPU, [L, G, E], -1 where it has none."""
    local = source.content
    num_layers, num_gpus, num_experts = local.shape
    slots = int(local.max()) + 1
    phy2log = np.full((num_layers, num_gpus, slots), -1)
    layer, gpu, expert = np.nonzero(local >= 0)
    phy2log[layer, gpu, local[layer, gpu, expert]] = expert
    flat = phy2log.reshape(num_layers, -1)
    return PlanFile(flat, numbered(num_layers), num_experts, Topology(num_gpus, slots))


def _complete(plan: PlanFile) -> None:
    if plan.phy2log.min() < 0:
        raise ValueError("vLLM's maps have an expert in every slot, but some hold -1")


FORMATS = (
    Format("vllm-log", "vLLM's log, lines EPLB step", _is_log, _refuse_log),
    Format(
        "vllm",
        "vLLM pull request 41141: JSONL statistics, and the mapping of initial_mapping_path",
        _is_stats,
        _read_stats,
        _read_mapping,
        _write_mapping,
    ),
    Format(
        "vllm-map",
        "vLLM pull request 49572: a JSON list, of initial_expert_map_path",
        _is_list,
        read_plan=_read_list,
        write_plan=_write_list,
    ),
    Format(
        "vllm-models",
        "vllm-plugin-das: model_maps, version 2",
        _is_models,
        read_plan=_read_models,
    ),
    Format(
        "vllm-local",
        "expert_map.pth: the local slot of every expert, [layers, GPUs, experts]",
        _is_local,
        read_plan=_read_local,
    ),
)
