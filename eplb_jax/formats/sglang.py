"""SGLang and sglang-jax: dumps of the expert distribution recorder, and expert locations."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from eplb_jax.formats.sources import Source, open_source
from eplb_jax.formats.types import (
    Format,
    PlanFile,
    Recording,
    logical_load,
    moe_layers,
    numbered,
)

_DUMP = re.compile(r"expert_distribution_recorder_(?P<time>.+?)(_(?P<rank>\d+))?\.pt")
_PHASES = {1: "prefill", 2: "decode"}
"""Of the numbers of SGLang's `ForwardMode`; others, such as mixed passes, have no phase."""

_MAP, _COUNT = "physical_to_logical_map", "logical_count"


def _is_stat(source: Source) -> bool:
    return source.kind == "torch" and {"rank", _COUNT} <= source.keys


def _read_stat(source: Source) -> Recording:
    """Windows are forward passes: the rows of a circular buffer that were written."""
    count = np.asarray(source.content[_COUNT])
    if count.ndim != 3:
        raise ValueError(f"{_COUNT} has the shape {count.shape}, not [passes, layers, experts]")
    written = np.flatnonzero(count.any(axis=(1, 2)))
    if not written.size:
        raise ValueError(f"none of the {len(count)} rows of the buffer was written")
    rows = written[-1] + 1
    if rows < len(count):
        note = f"{len(count) - rows} rows at the end of the buffer were not written"
    else:
        note = (
            f"the buffer of {rows} passes is full: if it was overwritten, the oldest pass is not "
            "the first, and the file does not say which is"
        )
    load, layers, notes = moe_layers(count[:rows])
    return Recording(load, layers, num_layers=count.shape[1], notes=(note, *notes))


def _is_passes(source: Source) -> bool:
    if source.kind == "folder":
        return any(_DUMP.fullmatch(name) for name in source.content)
    return source.kind == "torch" and "records" in source.keys


def _read_passes(source: Source) -> Recording:
    """Windows are forward passes; the files of all ranks are added up."""
    is_folder = source.kind == "folder"
    dumps = _dumps_of_one_time(source.content) if is_folder else [source.content]
    if len(dumps) == 1 and _COUNT in dumps[0]:
        return _read_stat(Source(source.path, "torch", dumps[0]))
    phy2log = np.asarray(dumps[0]["last_" + _MAP])
    passes: dict[int, np.ndarray] = {}
    modes: dict[int, set[int]] = {}
    ranks = set()
    for dump in dumps:
        if not np.array_equal(dump["last_" + _MAP], phy2log):
            raise ValueError("the files of the ranks have different maps")
        for record in dump["records"]:
            number = int(record["forward_pass_id"])
            count = np.asarray(record["global_physical_count"], np.int64)
            passes[number] = passes.get(number, 0) + count
            modes.setdefault(number, set()).add(int(record.get("forward_mode", 0)))
            ranks.add(int(record["rank"]))
    if not passes:
        raise ValueError("it has no records")
    order = sorted(passes)
    physical = np.stack([passes[x] for x in order])
    load = logical_load(physical, phy2log, int(phy2log.max()) + 1)
    kept, layers, notes = moe_layers(load)
    notes += (
        "the map is the last one: if experts were rebalanced while recording, counts before that "
        "are of other experts",
    )
    if len(ranks) == 1:
        notes += (f"only rank {min(ranks)} is counted; give the folder with the files of all",)
    phases = [_PHASES.get(min(modes[x]), "") if len(modes[x]) == 1 else "" for x in order]
    return Recording(
        kept,
        layers,
        tuple(phases) if any(phases) else (),
        phy2log[list(layers)],
        num_layers=len(phy2log),
        notes=notes,
    )


def _dumps_of_one_time(files: dict[str, Path]) -> list[dict[str, Any]]:
    found = {name: _DUMP.fullmatch(name) for name in files}
    times = sorted({x["time"] for x in found.values() if x is not None})
    if len(times) > 1:
        raise ValueError(
            f"it has dumps of {len(times)} times, {times[0]} to {times[-1]}; keep those of one in "
            "a folder"
        )
    names = sorted(name for name, x in found.items() if x is not None)
    return [open_source(files[name]).content for name in names]


def _is_location(source: Source) -> bool:
    if source.kind in ("npy", "torch") and is_map(source.content):
        return True
    return source.kind in ("json", "npy", "npz", "torch") and (
        _MAP in source.keys or (_COUNT in source.keys and "rank" not in source.keys)
    )


def is_map(value: Any) -> bool:
    """Whether it is an array that can only be a map: in every row the same numbers from 0."""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "iu":
        return False
    if not value.size or value.min() != 0 or value.max() >= value.shape[1]:
        return False
    numbers = np.arange(value.max() + 1)
    return all(np.array_equal(np.unique(row), numbers) for row in value)


def _read_counts(source: Source) -> Recording:
    if is_map(source.content) or _COUNT not in source.keys:
        raise ValueError("it holds a map, not loads")
    count = np.asarray(source.content[_COUNT])
    count = np.atleast_2d(count)  # sglang-jax takes a single row for all layers
    if count.ndim not in (2, 3):
        raise ValueError(f"{_COUNT} has the shape {count.shape}, not [layers, experts]")
    load, layers, notes = moe_layers(count.reshape(-1, *count.shape[-2:]))
    phy2log = source.content.get(_MAP)
    if phy2log is not None:
        phy2log = np.asarray(phy2log)[list(layers)]
    return Recording(load, layers, (), phy2log, num_layers=count.shape[-2], notes=notes)


def _read_location(source: Source) -> PlanFile:
    if not is_map(source.content) and _MAP not in source.keys:
        raise ValueError(f"it holds {_COUNT}, which SGLang plans from, and no map")
    phy2log = np.asarray(source.content if is_map(source.content) else source.content[_MAP])
    if phy2log.ndim != 2:
        raise ValueError(f"{_MAP} has the shape {phy2log.shape}, not [layers, slots]")
    count = len(phy2log)
    return PlanFile(phy2log, numbered(count), int(phy2log.max()) + 1, num_layers=count)


def _write_location(plan: PlanFile) -> bytes:
    if plan.phy2log.min() < 0:
        raise ValueError("SGLang indexes with the map, so no slot may be empty, but some hold -1")
    last = max(plan.layers) + 1
    count = last if plan.num_layers is None else plan.num_layers
    if last > count:
        raise ValueError(f"layer {last - 1} of a model of {count} layers")
    # Dense layers have a row too, which is not used.
    rows = np.tile(np.arange(plan.phy2log.shape[1]) % plan.num_experts, (count, 1))
    rows[list(plan.layers)] = plan.phy2log
    return _json({_MAP: rows.tolist()})


def _json(content: dict[str, Iterable[Any]]) -> bytes:
    return json.dumps(content).encode()


FORMATS = (
    Format("sglang-stat", "SGLang's recorder in mode stat, a .pt file", _is_stat, _read_stat),
    Format(
        "sglang-passes",
        "SGLang's recorder in mode per_pass or per_token, a folder of .pt files",
        _is_passes,
        _read_passes,
    ),
    Format(
        "sglang",
        "SGLang, sglang-jax, EasyDeL: physical_to_logical_map, for --init-expert-location, or "
        "logical_count",
        _is_location,
        _read_counts,
        _read_location,
        _write_location,
    ),
)
