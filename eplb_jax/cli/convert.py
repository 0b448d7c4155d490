"""`eplb-jax convert`: loads and plans from one format to another."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Argument, Option, echo

from eplb_jax import formats
from eplb_jax.checks import as_count
from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import Groups, LoadFormat, MaybeGpus, Nodes, To, numbers_in
from eplb_jax.cli.files import (
    PLANS,
    STDOUT,
    check_writable,
    plan_format,
    write_bytes,
    write_plan,
)
from eplb_jax.files import write_whole

_LOADS = (".npz", ".csv")
_NEED_GPUS = ("eplb-jax", "ascend", "verl")


def convert(
    source: Annotated[
        str, Argument(metavar="FILE", help="A file or folder of a known format, or a bundled load.")
    ],
    output: Annotated[
        Path,
        Option(
            "-o",
            "--output",
            help="File to write: loads to .npz or .csv, plans to .json or .yaml; - for stdout.",
        ),
    ],
    to: To = None,
    format: LoadFormat = None,
    num_gpus: MaybeGpus = None,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    layers: Annotated[
        str | None, Option(help="Numbers of the layers in the model, such as 3-60.")
    ] = None,
    model_layers: Annotated[
        int | None, Option(help="All layers of the model, with dense ones, for SGLang's maps.")
    ] = None,
    num_experts: Annotated[
        int | None, Option("--experts", help="Experts of a layer, if the last ones were never hit.")
    ] = None,
    merge: Annotated[
        int, Option(help="Windows to add up to one, such as the forward passes of a recorder.")
    ] = 1,
) -> None:
    """Write the loads of a recording, or a plan, in another format.

    A recording that holds the map in place is written as loads, or with --to as that map.
    """
    check_writable(output, (source,))
    if to is None and output.suffix.lower() in _LOADS:
        recording = inputs.read_loads(source, format, num_experts)
        if layers is not None:
            recording = recording._replace(layers=_layer_numbers(layers, recording.load.shape[1]))
        recording = _merged(recording, as_count("merge", merge))
        write_loads(output, recording)
        windows, count, experts = recording.load.shape
        echo(f"{output}: {windows} windows x {count} layers x {experts} experts", err=True)
        return
    if to is None and output != STDOUT and output.suffix.lower() not in PLANS:
        kinds = ", ".join((*_LOADS, *PLANS))
        raise ValueError(f"{output}: unknown kind of file; use one of: {kinds}, or --to")
    written = plan_format(output, to)
    plan = formats.read_plan(source, format)
    if written in _NEED_GPUS or (plan.topology is None and num_gpus is not None):
        plan = inputs.with_topology(plan, source, num_gpus, num_nodes, num_groups)
    if layers is not None:
        plan = plan._replace(layers=_layer_numbers(layers, len(plan.phy2log)))
    if model_layers is not None:
        plan = plan._replace(num_layers=model_layers)
    write_plan(output, plan, written)
    if output != STDOUT:
        echo(f"{output}: {len(plan.layers)} layers x {plan.phy2log.shape[1]} slots", err=True)


def _layer_numbers(text: str, count: int) -> tuple[int, ...]:
    numbers = tuple(numbers_in("--layers", text))
    if len(numbers) != count or len(set(numbers)) != count:
        raise ValueError(f"--layers={text} has {len(set(numbers))} numbers for {count} layers")
    return numbers


def _merged(recording: formats.Recording, count: int) -> formats.Recording:
    """Sums of so many consecutive windows of a phase; the last one of a phase may be of fewer."""
    if count == 1:
        return recording
    phases = np.array(recording.phases or [""] * len(recording.load))
    starts = [
        part[i : i + count]
        for phase in dict.fromkeys(phases)
        for part in [np.flatnonzero(phases == phase)]
        for i in range(0, len(part), count)
    ]
    starts.sort(key=lambda x: x[0])
    load = np.stack([recording.load[x].sum(axis=0) for x in starts])
    kept = tuple(phases[x[0]] for x in starts) if recording.phases else ()
    return recording._replace(load=load, phases=kept)


def write_loads(path: Path, recording: formats.Recording) -> None:
    """Write loads with the numbers of their layers: .npz, or .csv of triples."""
    if path.suffix.lower() == ".npz":
        named = {"load": recording.load, "layers": np.array(recording.layers)}
        named |= {"phases": np.array(recording.phases, str)}
        write_whole(path, partial(np.savez_compressed, **named))
        return
    lines = ["window,layer,expert,count"]
    lines += [
        f"{t},{recording.layers[i]},{e},{count}"
        for (t, i, e), count in np.ndenumerate(recording.load)
    ]
    write_bytes(path, ("\n".join(lines) + "\n").encode())
