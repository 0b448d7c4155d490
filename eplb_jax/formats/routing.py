"""Traces of routing itself: the experts of every token, or the counts of every microbatch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eplb_jax.formats.sources import Source, open_source
from eplb_jax.formats.types import LAST_IS_SEEN, Format, Recording, numbered

_PADDING = 255
"""Of unsigned arrays of experts; -1 of signed ones."""

_MOST_CHOSEN = 32
"""Largest number of experts of a token that is thought of."""


def _is_routed(source: Source) -> bool:
    if source.kind == "npz":
        return any(name.endswith("routed_experts") for name in source.keys)
    array = source.content
    if source.kind not in ("npy", "torch") or not isinstance(array, np.ndarray):
        return False
    small = array.dtype.kind in "iu" and array.dtype.itemsize <= 2
    return small and array.ndim in (3, 4) and array.shape[-1] <= _MOST_CHOSEN and _distinct(array)


def _distinct(experts: np.ndarray) -> bool:
    """Whether no token has an expert twice."""
    ordered = np.sort(experts.reshape(-1, experts.shape[-1]), axis=1).astype(np.int64)
    same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != _padding(experts))
    return not same.any()


def _padding(experts: np.ndarray) -> int:
    return _PADDING if experts.dtype.kind == "u" else -1


def _read_routed(source: Source) -> Recording:
    """A window of all tokens of prompts and one of all that were generated, or one of all."""
    if source.kind == "npz":
        arrays = {k: x for k, x in source.content.items() if k.endswith("routed_experts")}
        prompt = arrays.pop("prompt_routed_experts", None)
        mask = source.content.get("attention_mask")
    else:
        arrays, prompt, mask = {"routed_experts": source.content}, None, None
    if len(arrays) != 1:
        raise ValueError(f"expected one array of routed experts, got {', '.join(arrays) or 'none'}")
    windows = [] if prompt is None else [_tokens(np.asarray(prompt), None)]
    windows.append(_tokens(np.asarray(next(iter(arrays.values()))), mask))
    last = max(int(x[x != _padding(x)].max(initial=0)) for x in windows)
    load = np.stack([_count(x, last + 1) for x in windows])
    phases = () if prompt is None else ("prefill", "decode")
    notes = (LAST_IS_SEEN.format(last),)
    return Recording(load, numbered(load.shape[1]), phases, notes=notes)


def _tokens(experts: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The experts of all tokens, [tokens, layers, experts of a token], without masked ones."""
    if experts.dtype.kind not in "iu" or experts.ndim not in (3, 4):
        raise ValueError(
            "expected experts of the shape [tokens, layers, experts of a token], or with requests "
            f"before, got {experts.dtype} of the shape {experts.shape}"
        )
    if mask is not None and mask.shape != experts.shape[:-2]:
        raise ValueError(f"attention_mask of the shape {mask.shape} for {experts.shape[:-2]}")
    flat = experts.reshape(-1, *experts.shape[-2:])
    return flat if mask is None else flat[np.asarray(mask).ravel() != 0]


def _count(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens of every expert, [layers, experts]."""
    real = experts != _padding(experts)
    layer = np.broadcast_to(np.arange(experts.shape[1])[:, None], experts.shape)[real]
    index = layer * num_experts + experts[real].astype(np.int64)
    count = np.bincount(index, minlength=experts.shape[1] * num_experts)
    return count.reshape(-1, num_experts)


def _is_megatron(source: Source) -> bool:
    first = next(_lines(source), None)
    return isinstance(first, dict) and {"step", "layer", "top_indices"} <= first.keys()


def _lines(source: Source) -> Iterator[Any]:
    """The lines of a JSONL file, or of all of them in a folder."""
    if source.kind == "folder":
        for name, path in source.content.items():
            if name.endswith(".jsonl"):
                yield from _lines(open_source(path))
    elif source.kind == "jsonl":
        yield from source.content
    elif source.kind == "json":
        yield source.content


def _read_megatron(source: Source) -> Recording:
    """Windows are steps; the layers of multi-token prediction come after those of the decoder."""
    lines = [x for x in _lines(source) if "top_indices" in x]
    stages = list(dict.fromkeys(x.get("stage") for x in lines))
    stage = "pre_dispatch" if "pre_dispatch" in stages else stages[0]
    counts: dict[tuple[int, bool, int], list[np.ndarray]] = {}
    for line in lines:
        if line.get("stage") != stage:
            continue  # the same tokens once more
        prediction = line.get("mtp_idx")
        layer = int(line["layer"] if prediction is None else prediction)
        key = int(line["step"]), prediction is not None, layer
        counts.setdefault(key, []).append(np.asarray(line["top_indices"], np.int64).ravel())
    ids = {key: np.concatenate(x) for key, x in counts.items()}
    last = max(int(x.max(initial=0)) for x in ids.values())
    steps = sorted({step for step, _, _ in ids})
    decoder = sorted({layer for _, after, layer in ids if not after})
    after = sorted({layer for _, predicts, layer in ids if predicts})
    layers = [(False, x) for x in decoder] + [(True, x) for x in after]
    load = np.zeros((len(steps), len(layers), last + 1), np.int64)
    for (step, predicts, layer), x in ids.items():
        place = steps.index(step), layers.index((predicts, layer))
        load[place] = np.bincount(x[x >= 0], minlength=last + 1)
    notes = (LAST_IS_SEEN.format(last),)
    if len(stages) > 1:
        notes += (f"only the stage {stage} is counted, of {', '.join(map(str, stages))}",)
    first = decoder[-1] + 1 if decoder else 0
    return Recording(load, (*decoder, *(first + x for x in range(len(after)))), notes=notes)


def _is_ultra_ep(source: Source) -> bool:
    if source.kind != "folder" or "manifest.json" not in source.content:
        return False
    return "ultra_ep_trace_v1" in source.content["manifest.json"].read_text(encoding="utf-8")


def _read_ultra_ep(source: Source) -> Recording:
    """Windows are microbatches."""
    chunks = [_chunk(path) for name, path in source.content.items() if name.endswith(".npz")]
    if not chunks:
        raise ValueError("it has a manifest, but no .npz file")
    names = ("microbatches", "layers", "virtual_layers", "pre")
    batch, layer, virtual, pre = (
        np.concatenate([x[name] for x in chunks])
        if all(name in x for x in chunks)
        else np.zeros(sum(len(x["pre"]) for x in chunks), int)
        for name in names
    )
    batches, window = np.unique(batch, return_inverse=True)
    experts = pre.reshape(len(batch), -1)
    keys, row = np.unique(np.stack([layer, virtual]), axis=1, return_inverse=True)
    load = np.zeros((len(batches), keys.shape[1], experts.shape[1]), np.int64)
    np.add.at(load, (window, row.ravel()), experts)
    # Layers of several pipeline stages may have the same number.
    distinct = len(set(keys[0])) == keys.shape[1]
    return Recording(load, tuple(keys[0].tolist()) if distinct else numbered(keys.shape[1]))


def _chunk(path: Path) -> dict[str, np.ndarray]:
    return open_source(path).content


FORMATS = (
    Format(
        "routed-experts",
        "vLLM, SGLang, verl: routed_experts of requests, [tokens, layers, experts of a token]",
        _is_routed,
        _read_routed,
    ),
    Format("megatron", "Megatron-Core's routing trace, JSONL files", _is_megatron, _read_megatron),
    Format("ultra-ep", "UltraEP's trace, a folder", _is_ultra_ep, _read_ultra_ep),
)
