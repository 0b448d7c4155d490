"""`eplb-jax report`: one page for an operator."""

from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Annotated

import jax
from rich.console import Console
from typer import Argument, Option, echo

from eplb_jax import formats
from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import FILES, Groups, LoadFormat, MaybeGpus, MaybeReplicas, Nodes
from eplb_jax.cli.files import STDOUT, check_writable, write_bytes
from eplb_jax.evaluation.diagnosis import Costs, diagnose
from eplb_jax.types import Topology

_DEFAULTS = Costs()


def report(
    trace: Annotated[
        str,
        Argument(
            metavar="TRACE",
            help=f"Measured loads [windows, layers, experts], the oldest window first: {FILES}.",
        ),
    ],
    output: Annotated[Path, Option("-o", "--output", help="HTML file to write.")],
    plan: Annotated[
        str | None,
        Option(metavar="PLAN", help="The plan in place; default: the map in TRACE, or give those:"),
    ] = None,
    num_replicas: MaybeReplicas = None,
    num_gpus: MaybeGpus = None,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    format: LoadFormat = None,
    bytes_per_expert: Annotated[
        int | None, Option(help="Size of the parameters of one expert of one layer.")
    ] = None,
    seconds_per_token: Annotated[
        float | None, Option(help="Time of one token of one expert on a GPU.")
    ] = None,
    bandwidth: Annotated[
        float, Option(help="Bytes per second that a GPU sends, and receives.")
    ] = _DEFAULTS.bandwidth,
    serves: Annotated[
        float, Option(help="Windows that the new plan stays in place.")
    ] = _DEFAULTS.serves,
) -> None:
    """Write a page on what is out of balance, what to move, and what that is worth.

    A new plan is made from the first windows of the trace, and judged on the others.
    """
    from eplb_jax.cli.page import Source, page, verdict

    check_writable(output, (trace, plan))
    recording = inputs.read_loads(trace, format)
    loads, layers, phy2log = recording.load, recording.layers, None
    if len(loads) == 1:
        raise ValueError(
            f"{trace} has one window, of the shape {loads.shape[1:]}; a trace has several"
        )
    if plan is not None or (num_replicas is None and recording.phy2log is not None):
        sizes = num_gpus, num_nodes, num_groups
        if plan is not None:
            name, in_place = plan, inputs.read_plan(plan, *sizes)
        else:  # the notes on it are those of the loads
            name, in_place = trace, formats.map_in_place(recording)._replace(notes=())
            in_place = inputs.with_topology(in_place, trace, *sizes)
        loads, phy2log, layers = inputs.same_layers(recording, in_place, name)
        topology = inputs.topology_of(in_place)
    elif num_replicas is None or num_gpus is None:
        raise ValueError("give --plan, the plan in place, or --replicas and --gpus without one")
    else:
        topology = Topology.of_replicas(num_replicas, num_gpus, num_nodes, num_groups)
    costs = Costs(bytes_per_expert, seconds_per_token, bandwidth, serves)
    console = Console(stderr=True)
    waits = console.status("making plans and replaying the trace; the first run compiles")
    with waits if console.is_terminal else nullcontext():
        diagnosis = diagnose(loads, topology, phy2log, costs=costs)
    named = None if phy2log is None else (plan or trace)
    source = Source(trace, named, layers, _made())
    text = page(diagnosis, source)
    write_bytes(output, text.encode())
    title, why = verdict(diagnosis)
    echo(f"{output}: {title}: {why}", err=output == STDOUT)


def _made() -> list[str]:
    """When, and with which versions on which device."""
    versions = (f"{name} {version(name)}" for name in ("eplb-jax", "jax", "numpy"))
    device = jax.devices()[0]
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ", ".join([*versions, f"Python {python_version()}"]),
        f"plans made on {device.platform} ({device.device_kind})",
    ]
