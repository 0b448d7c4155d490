"""Loads and plans that commands read, and how the layers of one are found in the other."""

from typing import NamedTuple

import numpy as np
import typer

from eplb_jax import formats
from eplb_jax.evaluation import loads
from eplb_jax.evaluation.sanity import inspect_loads
from eplb_jax.formats import PlanFile, Recording
from eplb_jax.formats.sources import open_source
from eplb_jax.planning.plan import plan as make_plan
from eplb_jax.types import Topology


def read_loads(name: str, format: str | None = None, num_experts: int | None = None) -> Recording:
    """The bundled loads of that name, or those in a file; what is noteworthy goes to stderr."""
    if name == "example" or name in loads.EXAMPLES:
        if format is not None:
            raise ValueError(f"--format={format} is for files; {name} is bundled")
        load = loads.example() if name == "example" else loads.example(name)
        found = Recording(load, tuple(range(load.shape[1])))
    else:
        found = formats.read(name, format, num_experts=num_experts)
        warn(f"{name}, read as {found.format}", found.notes)
    findings = inspect_loads(found.load, layers=found.layers)
    warn(f"{name}: warning", tuple(x.message for x in findings))
    return found


def read_seconds(name: str) -> np.ndarray:
    """The times in a file: .npy, a JSON list, or text with a line for every window.

    Raises:
        ValueError: The file is none of these, or holds something else than numbers.
    """
    source = open_source(name)
    content = source.content
    if source.kind == "text":
        content = content.split()
    elif source.kind not in ("npy", "json", "table"):
        raise ValueError(f"{name} holds {source.kind}; seconds are .npy, a JSON list or lines")
    try:
        return np.asarray(content, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not hold the seconds of windows: {error}") from error


def read_plan(
    name: str,
    num_gpus: int | None = None,
    num_nodes: int = 1,
    num_groups: int = 1,
    *,
    format: str | None = None,
) -> PlanFile:
    """The plan in a file, with its topology; errors are those of `with_topology`."""
    found = formats.read_plan(name, format)
    return with_topology(found, name, num_gpus, num_nodes, num_groups)


def with_topology(
    found: PlanFile, name: str, num_gpus: int | None, num_nodes: int, num_groups: int = 1
) -> PlanFile:
    """The plan of a file with its topology: that of the file, or so many equal GPUs.

    Raises:
        ValueError: The file does not say how many GPUs there are, and neither does num_gpus; or
            they differ.
    """
    warn(f"{name}, read as {found.format}", found.notes)
    num_slots, known = found.phy2log.shape[1], found.topology
    if known is not None and num_gpus not in (None, known.num_gpus):
        raise ValueError(f"--gpus={num_gpus}, but the plan in {name} is for {known.num_gpus}")
    if known is not None and num_nodes in (1, known.num_nodes):
        return found
    num_gpus = known.num_gpus if known is not None else num_gpus
    if num_gpus is None:
        raise ValueError(f"{name} does not say how many GPUs its {num_slots} slots are on: --gpus")
    return found._replace(topology=Topology.of_replicas(num_slots, num_gpus, num_nodes, num_groups))


def topology_of(plan: PlanFile) -> Topology:
    """The topology of a plan that `read_plan` has read."""
    assert plan.topology is not None
    return plan.topology


def warn(name: str, notes: tuple[str, ...]) -> None:
    """Notes on what was read, on stderr."""
    for note in notes:
        typer.echo(f"eplb-jax: {name}: {note}", err=True)


class Aligned(NamedTuple):
    """Loads and a plan of the same layers, with the number of every layer."""

    load: np.ndarray  # [T, L, E]
    phy2log: np.ndarray  # [L, R]
    layers: tuple[int, ...]


def same_layers(recording: Recording, plan: PlanFile, name: str) -> Aligned:
    """The loads and the plan of the layers that both have.

    Raises:
        ValueError: They have no layer in common, or not the same experts.
    """
    if recording.load.shape[2] != plan.num_experts:
        raise ValueError(
            f"{name} has {plan.num_experts} experts, but the loads have {recording.load.shape[2]}"
        )
    both = [x for x in recording.layers if x in set(plan.layers)]
    if not both:
        raise ValueError(
            f"{name} has layers {_few(plan.layers)}, and the loads have {_few(recording.layers)}; "
            "eplb-jax convert --layers gives the loads other numbers"
        )
    only = [x for x in plan.layers if x not in set(both)]
    extra = [x for x in recording.layers if x not in set(both)]
    notes = (f"no load for its layers {_few(only)}",) if only else ()
    notes += (f"no plan for the layers {_few(extra)} of the loads",) if extra else ()
    warn(name, notes)
    of_load = [recording.layers.index(x) for x in both]
    of_plan = [plan.layers.index(x) for x in both]
    return Aligned(recording.load[:, of_load], plan.phy2log[of_plan], tuple(both))


def all_layers(recording: Recording, plan: PlanFile, name: str) -> Aligned:
    """The loads and the plan of the layers that either has.

    A layer that has no load keeps its plan; one that has no plan gets a new one.

    Raises:
        ValueError: They have no layer in common, or not the same experts.
    """
    same_layers(recording, plan, name)
    layers = tuple(sorted({*recording.layers, *plan.layers}))
    load = np.zeros((len(recording.load), len(layers), plan.num_experts), recording.load.dtype)
    load[:, [layers.index(x) for x in recording.layers]] = recording.load
    phy2log = np.zeros((len(layers), plan.phy2log.shape[1]), np.int32)
    phy2log[[layers.index(x) for x in plan.layers]] = plan.phy2log
    new = [layers.index(x) for x in layers if x not in set(plan.layers)]
    if new:
        phy2log[new] = make_plan(load[:, new], topology_of(plan)).phy2log
    return Aligned(load, phy2log, layers)


def two_plans(
    old: str, new: str, num_gpus: int | None, num_nodes: int
) -> tuple[PlanFile, PlanFile, tuple[int, ...]]:
    """Two plans of the same slots, cut to the layers that both have, and their numbers.

    A plan that does not say how many GPUs there are is taken to be for those of the other one.

    Raises:
        ValueError: They are for other layers, slots or GPUs.
    """
    found = [formats.read_plan(name) for name in (old, new)]
    first = next((x.topology for x in found if x.topology is not None), None)
    if first is not None and num_gpus is None:
        num_gpus = first.num_gpus
        num_nodes = first.num_nodes if num_nodes == 1 else num_nodes
    before, after = (
        with_topology(x, name, num_gpus, num_nodes)
        for x, name in zip(found, (old, new), strict=True)
    )
    if before.phy2log.shape[1] != after.phy2log.shape[1]:
        raise ValueError(
            f"{old} has {before.phy2log.shape[1]} slots and {new} has {after.phy2log.shape[1]}; "
            "moves are between plans of the same slots"
        )
    both = tuple(x for x in after.layers if x in set(before.layers))
    if not both:
        raise ValueError(f"{old} has layers {_few(before.layers)}, {new} {_few(after.layers)}")
    cut = [
        x._replace(phy2log=x.phy2log[[x.layers.index(i) for i in both]], layers=both)
        for x in (before, after)
    ]
    return cut[0], cut[1], both


def _few(layers: object) -> str:
    numbers = [str(x) for x in layers]  # pyright: ignore[reportGeneralTypeIssues]
    return ", ".join(numbers if len(numbers) < 9 else [*numbers[:4], "...", numbers[-1]])
