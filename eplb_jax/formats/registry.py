"""All formats, and the three functions that use them."""

from pathlib import Path

import numpy as np

from eplb_jax.formats import arrays, ascend, lists, plans, routing, sglang, tensorrt_llm, vllm
from eplb_jax.formats.sources import Source, open_source
from eplb_jax.formats.types import Format, PlanFile, Recording, numbered
from eplb_jax.types import Topology

_SYSTEMS = plans, sglang, vllm, tensorrt_llm, ascend, lists, routing, arrays

FORMATS: dict[str, Format] = {x.name: x for system in _SYSTEMS for x in system.FORMATS}
"""Every format by its name."""


def read(
    path: str | Path, format: str | None = None, *, num_experts: int | None = None
) -> Recording:
    """The loads that an engine recorded.

    Args:
        path: A file, or the folder of a recorder that writes several.
        format: The name of one of `FORMATS`; None: recognised by its content.
        num_experts: E, for files that do not say: experts past the last one seen have no load.

    Raises:
        ValueError: The file cannot be read, is of no known format, fits several, or does not hold
            loads.

    Example:
        >>> read("expert_distribution_recorder_1764.pt").load.shape  # doctest: +SKIP
        (1000, 58, 256)
    """
    source = open_source(path)
    chosen = _choose(source, format, "loads")
    if chosen.read is None:
        raise ValueError(f"{path} holds a plan ({chosen.name}: {chosen.title}), not loads")
    try:
        found = _checked(chosen.read(source), num_experts)._replace(format=chosen.name)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _named(path, chosen, error) from error
    if format is None and sglang.is_map(found.load[0]) and found.load.size > 1:
        experts = found.load.max()
        raise ValueError(
            f"{path} looks like a map of experts 0 to {experts}, not like loads, as every row has "
            f"all of these numbers and no other; if these are loads, say so: format={chosen.name!r}"
        )
    return found


def read_plan(path: str | Path, format: str | None = None) -> PlanFile:
    """The plan in a file of an engine, or in one that `write_plan` wrote.

    A recording that holds the map in place is read as that map.

    Args:
        path: The file.
        format: The name of one of `FORMATS`; None: recognised by its content.

    Raises:
        ValueError: The file cannot be read, is of no known format, fits several, or does not hold
            a plan.

    Example:
        >>> read_plan("plan.json").phy2log.shape  # doctest: +SKIP
        (58, 288)
    """
    source = open_source(path)
    chosen = _choose(source, format, "plan")
    try:
        if chosen.read_plan is not None:
            found = chosen.read_plan(source)
        else:
            assert chosen.read is not None  # a format reads one of the two
            found = map_in_place(chosen.read(source))
        return found._replace(phy2log=_experts(found), format=chosen.name)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _named(path, chosen, error) from error


def write_plan(plan: PlanFile, format: str) -> bytes:
    """The file of a plan in the format of an engine.

    Args:
        plan: The plan.
        format: The name of one of `FORMATS` that is written.

    Raises:
        ValueError: The format is not known, or cannot hold this plan.
    """
    written = {name: x.write_plan for name, x in FORMATS.items() if x.write_plan is not None}
    if format not in written:
        raise ValueError(f"format={format!r} cannot be written; choose one of: {_listed(written)}")
    if len(plan.layers) != len(plan.phy2log):
        raise ValueError(f"{len(plan.layers)} layer numbers for {len(plan.phy2log)} layers")
    return written[format](plan._replace(phy2log=_experts(plan)))


def _choose(source: Source, name: str | None, wanted: str) -> Format:
    reads_plans = {k for k, x in FORMATS.items() if x.read_plan is not None}
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"format={name!r} is not known; choose one of: {_listed(FORMATS)}")
        return FORMATS[name]
    found = [x for x in FORMATS.values() if x.matches(source)]
    # A bare list of numbers may be loads or a map: what is wanted decides.
    fitting = [x for x in found if (x.name in reads_plans) == (wanted == "plan")] or found
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " or ".join(f"{x.name} ({x.title})" for x in fitting)
        raise ValueError(f"{source.path} may be {names}; say which: format={fitting[0].name!r}")
    raise ValueError(
        f"{source.path} is of no known format: {_describe(source)}; known are: {_listed(FORMATS)}"
    )


def _describe(source: Source) -> str:
    """What was seen of a file, in a few words."""
    if source.kind == "folder":
        return f"a folder of {len(source.content)} files"
    if source.kind == "table":
        return f"a table whose first line is {','.join(source.content[0])[:60]!r}"
    if source.keys:
        return f"{source.kind} with the keys {_listed(sorted(source.keys)[:8])}"
    return f"{source.kind}, {type(source.content).__name__}"


def _checked(recording: Recording, num_experts: int | None) -> Recording:
    """The recording with loads [T, L, E] in 64 bits, and -1 or more of everything else."""
    load = np.asarray(recording.load)
    if load.ndim == 2:
        load = load[None]
    if load.dtype.kind not in "iufb" or load.ndim != 3 or load.size == 0:
        raise ValueError(
            "expected numbers of the shape [layers, experts] or [windows, layers, experts], "
            f"got {load.dtype} of the shape {load.shape}"
        )
    if load.dtype.kind == "u" and load.size and load.max() > np.iinfo(np.int64).max:
        raise ValueError(f"a load of {load.max()} does not fit in 64 bits")
    load = load.astype(np.float64 if load.dtype.kind == "f" else np.int64)
    for where in np.argwhere(~((load >= 0) & np.isfinite(load)))[:1]:
        window, layer, expert = where
        raise ValueError(
            f"window {window}, layer {layer}, expert {expert} is {load[tuple(where)]}; "
            "loads must be finite and not negative"
        )
    if load.astype(np.float64).sum() > np.iinfo(np.int64).max:
        raise ValueError("the loads of all windows add up to more than 2^63 tokens")
    more = 0 if num_experts is None else num_experts - load.shape[2]
    if more < 0:
        raise ValueError(f"num_experts={num_experts}, but there are {load.shape[2]} experts")
    load = np.pad(load, ((0, 0), (0, 0), (0, more)))
    layers = tuple(map(int, recording.layers)) or numbered(load.shape[1])
    if len(layers) != load.shape[1] or len(set(layers)) != len(layers):
        raise ValueError(f"{load.shape[1]} layers of loads with the numbers {layers}")
    return recording._replace(load=load, layers=layers)


def map_in_place(recording: Recording) -> PlanFile:
    """The map that a recording holds, as a plan.

    Raises:
        ValueError: It holds none.
    """
    if recording.phy2log is None:
        raise ValueError("it holds loads, but no map")
    num_slots, num_gpus = recording.phy2log.shape[1], recording.num_gpus
    topology = None if num_gpus is None else Topology.of_replicas(num_slots, num_gpus)
    return PlanFile(
        recording.phy2log,
        recording.layers,
        recording.load.shape[-1],
        topology,
        recording.num_layers,
        recording.format,
        recording.notes,
    )


def _experts(plan: PlanFile) -> np.ndarray:
    """The map in 32 bits, checked: every layer has a slot for every expert."""
    phy2log = np.asarray(plan.phy2log)
    if phy2log.dtype.kind not in "iu" or phy2log.ndim != 2 or phy2log.size == 0:
        raise ValueError(
            f"a map must hold integers of the shape [layers, slots], got {phy2log.dtype} of the "
            f"shape {phy2log.shape}"
        )
    if phy2log.min() < -1 or phy2log.max() >= plan.num_experts:
        bad = phy2log.min() if phy2log.min() < -1 else phy2log.max()
        raise ValueError(f"the map names expert {bad} of {plan.num_experts}")
    for row, number in zip(phy2log, plan.layers, strict=True):
        missing = np.setdiff1d(np.arange(plan.num_experts), row)
        if missing.size:
            raise ValueError(f"layer {number} has no slot for expert {missing[0]}")
    return phy2log.astype(np.int32)


def _named(path: str | Path, chosen: Format, error: Exception) -> ValueError:
    if isinstance(error, ValueError):
        return ValueError(f"{path}, read as {chosen.name}: {error}")
    return ValueError(f"{path} is not a file of {chosen.name} ({chosen.title}): {error!r}")


def _listed(names: object) -> str:
    return ", ".join(map(str, names))  # pyright: ignore[reportArgumentType]
