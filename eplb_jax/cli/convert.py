"""`eplb-jax convert`: loads and plans from one format to another."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Argument, Option, echo

from eplb_jax import formats
from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import Groups, Layers, LoadFormat, MaybeGpus, ModelLayers, Nodes, To
from eplb_jax.cli.files import STDOUT, check_writable, plan_format, write_bytes, write_plan
from eplb_jax.files import write_whole

_LOADS = (".npz", ".csv")


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
    layers: Layers = None,
    model_layers: ModelLayers = None,
) -> None:
    """Write the loads of a recording, or a plan, in another format.

    A recording that holds the map in place is written as loads, or with --to as that map.
    """
    check_writable(output, (source,))
    if to is None and output.suffix.lower() in _LOADS:
        recording = inputs.read_loads(source, format, layers)
        write_loads(output, recording)
        windows, count, experts = recording.load.shape
        echo(f"{output}: {windows} windows x {count} layers x {experts} experts", err=True)
        return
    written = plan_format(output, to)
    if written in ("eplb-jax", "ascend"):
        plan = inputs.read_plan(source, num_gpus, num_nodes, num_groups, format=format)
    else:  # formats that do not need the GPUs
        plan = formats.read_plan(source, format)
        if plan.topology is None and num_gpus is not None:
            plan = inputs.read_plan(source, num_gpus, num_nodes, num_groups, format=format)
    if layers is not None:
        plan = plan._replace(layers=inputs.layer_numbers(layers, len(plan.phy2log)))
    if model_layers is not None:
        plan = plan._replace(num_layers=model_layers)
    write_plan(output, plan, written)
    if output != STDOUT:
        echo(f"{output}: {len(plan.layers)} layers x {plan.phy2log.shape[1]} slots", err=True)


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
