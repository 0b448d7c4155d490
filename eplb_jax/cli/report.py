"""`eplb-jax report`: one page for an operator."""

import json
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Annotated

import jax
import numpy as np
from rich.console import Console
from typer import Argument, Option, echo

from eplb_jax.cli.arguments import FILES, read
from eplb_jax.cli.files import check_writable, write_whole
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
        Path | None,
        Option(help="The plan in place, a JSON file as of `eplb-jax plan -o`; or give the next."),
    ] = None,
    num_replicas: Annotated[
        int | None, Option("--replicas", help="Physical slots of a layer, over all GPUs.")
    ] = None,
    num_gpus: Annotated[int | None, Option("--gpus", help="GPUs, over all nodes.")] = None,
    num_groups: Annotated[
        int | None, Option("--groups", help="Groups of experts.", show_default="1")
    ] = None,
    num_nodes: Annotated[int | None, Option("--nodes", help="Nodes.", show_default="1")] = None,
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

    check_writable(output)
    loads = read(trace)
    if loads.ndim != 3:
        raise ValueError(
            f"{trace} has the shape {loads.shape}; a trace is [windows, layers, experts]"
        )
    sizes = num_replicas, num_gpus, num_nodes, num_groups
    if plan is not None:
        if any(x is not None for x in sizes):
            raise ValueError(f"{plan} has its own replicas, gpus, nodes and groups; give only it")
        phy2log, topology = _read_plan(plan)
    elif num_replicas is None or num_gpus is None:
        raise ValueError("give --plan, the plan in place, or --replicas and --gpus without one")
    else:
        phy2log = None
        topology = Topology.of_replicas(num_replicas, num_gpus, num_nodes or 1, num_groups or 1)
    costs = Costs(bytes_per_expert, seconds_per_token, bandwidth, serves)
    console = Console(stderr=True)
    waits = console.status("making plans and replaying the trace; the first run compiles")
    with waits if console.is_terminal else nullcontext():
        diagnosis = diagnose(loads, topology, phy2log, costs=costs)
    source = Source(trace, None if plan is None else str(plan), None, _made())
    text = page(diagnosis, source)
    write_whole(output, lambda file: file.write(text.encode()))
    title, why = verdict(diagnosis)
    echo(f"{output}: {title}: {why}")


def _read_plan(path: Path) -> tuple[np.ndarray, Topology]:
    """The map [L, R] and the topology in a file of `eplb-jax plan -o`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a readable JSON file of a plan: {error}") from error
    needed = "phy2log", "num_gpus"
    for name in needed:
        if not isinstance(data, dict) or name not in data:
            raise ValueError(f"{path} has no {name!r}; a plan is a file of `eplb-jax plan -o`")
    try:
        phy2log = np.asarray(data["phy2log"])
    except ValueError as error:
        raise ValueError(f"{path}: phy2log is not [layers, slots]: {error}") from error
    if phy2log.ndim != 2 or phy2log.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: phy2log must be integers [layers, slots], got {phy2log.dtype} of the shape "
            f"{phy2log.shape}"
        )
    sizes = data["num_gpus"], data.get("num_nodes", 1), data.get("num_groups", 1)
    return phy2log, Topology.of_replicas(phy2log.shape[1], *sizes)


def _made() -> list[str]:
    """When, and with which versions on which device."""
    versions = (f"{name} {version(name)}" for name in ("eplb-jax", "jax", "numpy"))
    device = jax.devices()[0]
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        ", ".join([*versions, f"Python {python_version()}"]),
        f"plans made on {device.platform} ({device.device_kind})",
    ]
