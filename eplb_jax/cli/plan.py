"""`eplb-jax plan`: one plan from measured loads."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Context, Option

from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import (
    Groups,
    Json,
    Load,
    LoadFormat,
    MaybeGpus,
    MaybeReplicas,
    Nodes,
    Plot,
    PolicyName,
    SecondsPerActiveExpert,
    SecondsPerToken,
    Split,
    Tile,
    To,
    TokensPerStep,
    active_gpus,
    as_cost,
    check_seed,
)
from eplb_jax.cli.files import (
    STDOUT,
    check_drawable,
    check_writable,
    plan_format,
    write_figure,
    write_json,
    write_plan,
)
from eplb_jax.cli.moves import moved
from eplb_jax.evaluation.metrics import Balance, balance, balance_of, gap, gpu_loads_in_order
from eplb_jax.evaluation.replay import time_plan
from eplb_jax.formats import PlanFile
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.planning.plan import plan as make_plan
from eplb_jax.planning.policy import Policy, resolve_policy
from eplb_jax.planning.strategies import STRATEGIES
from eplb_jax.transition.moves import moves
from eplb_jax.types import Placement, Topology


def plan(
    ctx: Context,
    load: Load,
    num_replicas: MaybeReplicas = None,
    num_gpus: MaybeGpus = None,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    policy: PolicyName = "auto",
    strategy: Annotated[str, Option(help=f"One of: {', '.join(STRATEGIES)}.")] = "auto",
    seed: Annotated[int, Option(help="Seed of strategies that draw at random.")] = 0,
    total: Annotated[bool, Option("--sum", help="Plan for the sum of the windows.")] = False,
    previous: Annotated[
        str | None, Option(metavar="PLAN", help="Plan in place: the start of the new one.")
    ] = None,
    tolerance: Annotated[
        float | None, Option(help="How much worse than a new plan the next one may be.")
    ] = None,
    max_moves: Annotated[
        int | None, Option(help="Most slots of a layer filled from other GPUs.")
    ] = None,
    move_penalty: Annotated[float | None, Option(help="Imbalance that a move must gain.")] = None,
    active: Annotated[
        str | None, Option(metavar="GPUS", help="GPUs that are alive, such as 0-5,7; default: all.")
    ] = None,
    split: Split = None,
    seconds_per_token: SecondsPerToken = None,
    seconds_per_active_expert: SecondsPerActiveExpert = None,
    tile: Tile = None,
    tokens_per_step: TokensPerStep = None,
    format: LoadFormat = None,
    output: Annotated[
        Path | None, Option("-o", "--output", help="Plan file to write; - for standard output.")
    ] = None,
    to: To = None,
    plot: Plot = None,
    json_file: Json = None,
) -> None:
    """Plan the expert of every slot, and print how balanced the GPUs are.

    The plan is made for all windows of the load, and balance is the mean over them.
    """
    check_seed(seed)
    read = load, previous
    check_writable(output, read)
    check_writable(json_file, read)
    check_drawable(plot, read)
    if STDOUT == output == json_file:
        raise ValueError("--output and --json cannot both be standard output")
    written = plan_format(output, to)
    recording = inputs.read_loads(load, format)
    loads, numbers, old = recording.load, recording.layers, None
    if previous is None:
        if num_replicas is None or num_gpus is None:
            raise ValueError("give --replicas and --gpus, or --previous, a plan in place")
        topology = Topology.of_replicas(num_replicas, num_gpus, num_nodes, num_groups)
    else:
        in_place = inputs.read_plan(previous, num_gpus, num_nodes, num_groups)
        topology = inputs.topology_of(in_place)
        loads, old, numbers = inputs.all_layers(recording, in_place, previous)
        if num_replicas not in (None, topology.num_replicas):
            topology = Topology.of_replicas(
                num_replicas, topology.num_gpus, topology.num_nodes, topology.num_groups
            )
    loads = loads[0] if len(loads) == 1 else loads.sum(axis=0) if total else loads
    asked = policy
    policy = resolve_policy(cast(Policy, policy), topology.num_groups, topology.num_nodes)
    alive = active_gpus(active, topology.num_gpus)
    options: dict[str, Any] = {"policy": policy, "strategy": strategy, "key": jax.random.key(seed)}
    options |= {"previous": old, "active": alive, "max_moves": max_moves}
    shared = cast(Literal["flexible"] | None, split)  # checked by the plan
    cost = as_cost(seconds_per_token, seconds_per_active_expert, tile, tokens_per_step)
    options |= {"move_penalty": move_penalty, "split": shared, "cost": cost}
    options |= {"tolerance": TOLERANCE if tolerance is None else tolerance}
    console, error = Console(highlight=False, stderr=STDOUT in (output, json_file)), _stderr()
    with error.status("compiling and planning"):
        placement, seconds, compile_seconds = time_plan(
            partial(make_plan, loads, topology, **options)
        )
    alone = gpu_loads_in_order(loads, topology.num_gpus, cost)
    before = balance_of(jnp.asarray(alone, jnp.float32))
    columns = {"no balancer": before}
    if old is not None and old.shape == placement.phy2log.shape and alive is None:
        columns["in place"] = balance(loads, old, topology, split=shared, cost=cost)
    columns["plan"] = balance(loads, placement, topology, split=shared, cost=cost)
    whole = alive is None and bool(np.all(topology.slots_of_gpu))
    above = gap(loads, placement, topology, split=shared, cost=cost) if whole else None
    console.print(_table(loads.shape, numbers, columns, above, timed=cost is not None))
    if asked == "auto" and topology.num_nodes > 1:
        divides = "divide" if policy == "hierarchical" else "do not divide"
        nodes, groups = topology.num_nodes, topology.num_groups
        console.print(f"policy: {policy}, as {nodes} nodes {divides} {groups} groups")
    transfers = None
    if old is not None and old.shape == placement.phy2log.shape:
        transfers = moves(old, placement, topology, active=alive)
        console.print(moved(transfers))
    device = jax.devices()[0]
    console.print(
        f"compiled in {compile_seconds:.2f} s, planned in {seconds * 1e3:.1f} ms on "
        f"{device.platform} ({device.device_kind})"
    )
    unused = ("output", "to", "plot", "json_file")
    made = {k: v for k, v in ctx.params.items() if k not in unused and v is not None}
    made |= {"eplb_jax": version("eplb-jax"), "policy": policy}
    made = {
        "made": made,
        "balancedness": round(float(columns["plan"].mean_balancedness), 6),
    }
    if output is not None:
        phy2log = np.asarray(placement.phy2log)
        content = PlanFile(phy2log, numbers, loads.shape[-1], topology, recording.num_layers)
        write_plan(output, content, written, made | _inverse(placement))
    numbers_of = {k: {"imbalance": _mean_over_windows(x.imbalance)} for k, x in columns.items()}
    write_json(
        json_file,
        made
        | {"layers": numbers, "columns": numbers_of, "phy2log": placement.phy2log}
        | {"gap": None if above is None else _mean_over_windows(above)}
        | {"copies": None if transfers is None else transfers.copies}
        | {"seconds": seconds, "compile_seconds": compile_seconds},
    )
    if plot is not None:
        from eplb_jax.cli.picture import picture_of_plan

        write_figure(plot, picture_of_plan(before, columns["plan"]))


def _stderr() -> Console:
    """A console for progress, which is shown on a terminal alone."""
    return Console(stderr=True)


def _inverse(placement: Placement) -> dict[str, Any]:
    """The maps that follow from phy2log, for readers that do not want to derive them."""
    listed = placement.log2phy[..., : int(placement.logcnt.max())]
    return {"log2phy": listed.tolist(), "logcnt": placement.logcnt.tolist()}


def _table(
    shape: tuple[int, ...],
    layers: tuple[int, ...],
    columns: dict[str, Balance],
    gaps: jax.Array | None,
    *,
    timed: bool,
) -> Table:
    windows = f", mean over {shape[0]} windows" if len(shape) == 3 else ""
    title = f"{shape[-2]} layers x {shape[-1]} experts{windows}"
    table = Table("", title=title, title_justify="left")
    for header in columns:
        table.add_column(header, justify="right")
    mean = (f"{x.mean_balancedness:.4f}" for x in columns.values())
    each = [_mean_over_windows(x.imbalance) for x in columns.values()]
    table.add_row("balancedness (mean / max GPU load)", *mean)
    table.add_row("imbalance (max / mean GPU load - 1)", *(f"{x.mean():.2%}" for x in each))
    worst = (f"{layers[x.argmax()]}, {x.max():.2%}" for x in each)
    table.add_row("worst layer, its imbalance", *worst)
    if timed:
        most = [float(jnp.sum(jnp.max(x.gpu_load, axis=-1))) for x in columns.values()]
        table.add_row("time of the slowest GPUs", *(f"{x / most[0]:.3f}" for x in most))
    if gaps is not None:
        above = _mean_over_windows(gaps)
        bound = f"{above.mean():.2%}, {above.max():.2%}"
        empty = [""] * (len(columns) - 1)
        table.add_row("above the proven bound (mean, worst layer)", *empty, bound)
    return table


def _mean_over_windows(values: jax.Array) -> np.ndarray:
    """The mean over windows."""
    return np.asarray(values).reshape(-1, values.shape[-1]).mean(axis=0)
