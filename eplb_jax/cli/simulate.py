"""`eplb-jax simulate`: a trace replayed under several strategies."""

from functools import partial
from typing import Annotated, Literal, cast

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from typer import Context, Option

from eplb_jax.checks import as_count
from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import (
    Gpus,
    Groups,
    Json,
    Load,
    LoadFormat,
    Nodes,
    Plot,
    PolicyName,
    Replicas,
    SecondsPerActiveExpert,
    SecondsPerToken,
    Split,
    Tile,
    TokensPerStep,
    as_cost,
    numbers_in,
)
from eplb_jax.cli.files import STDOUT, check_drawable, check_writable, write_bytes, write_figure
from eplb_jax.cli.results import as_json, table
from eplb_jax.evaluation.replay import (
    plan_from_history,
    plan_from_last_window,
    replay,
    without_balancer,
)
from eplb_jax.evaluation.spares import spares_curve
from eplb_jax.planning.history import REMEMBERED
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.planning.policy import Policy
from eplb_jax.planning.strategies import STRATEGIES
from eplb_jax.types import Topology

LAST_WINDOW, NO_BALANCER = "deepseek, last window", "no balancer"


def simulate(
    ctx: Context,
    trace: Load,
    num_replicas: Replicas,
    num_gpus: Gpus,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    policy: PolicyName = "auto",
    window: Annotated[int, Option(help="Past windows that a plan is made from.")] = 8,
    every: Annotated[int, Option(help="Windows that a plan stays in place.")] = 1,
    memory: Annotated[
        int, Option(help="Groups of older windows that are remembered; 0: none.")
    ] = REMEMBERED,
    strategy: Annotated[
        list[str] | None,
        Option(
            help=f"One of: {', '.join(STRATEGIES)}; may be given several times.",
            show_default="auto",
        ),
    ] = None,
    keep: Annotated[bool, Option(help="Start each plan from the one in place.")] = True,
    tolerance: Annotated[
        float, Option(help="How much worse than a new plan the next one may be.")
    ] = TOLERANCE,
    max_moves: Annotated[
        int | None, Option(help="Most slots of a layer filled from other GPUs.")
    ] = None,
    move_penalty: Annotated[float | None, Option(help="Imbalance that a move must gain.")] = None,
    shuffle: Annotated[int | None, Option(metavar="SEED", help="Shuffle the windows.")] = None,
    split: Split = None,
    seconds_per_token: SecondsPerToken = None,
    seconds_per_active_expert: SecondsPerActiveExpert = None,
    tile: Tile = None,
    tokens_per_step: TokensPerStep = None,
    spares: Annotated[
        str | None,
        Option(metavar="SLOTS", help="Slots of a GPU to try, such as 4-6, on the last quarter."),
    ] = None,
    format: LoadFormat = None,
    plot: Plot = None,
    json_file: Json = None,
) -> None:
    """Replay a trace: plan from what was seen, and measure each plan on the following windows."""
    check_writable(json_file, (trace,))
    check_drawable(plot, (trace,))
    counts = inputs.read_loads(trace, format).load
    if len(counts) == 1:
        raise ValueError(
            f"{trace} has one window, of the shape {counts.shape[1:]}; "
            "a trace is [windows, layers, experts]"
        )
    order = np.arange(len(counts))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(counts))
        counts = counts[order]
    topology = Topology.of_replicas(num_replicas, num_gpus, num_nodes, num_groups)
    names = tuple(dict.fromkeys(strategy or ["auto"]))
    checked = cast(Policy, policy)  # by the first plan
    limits = {"keep": keep, "tolerance": tolerance, "max_moves": max_moves}
    limits["move_penalty"] = move_penalty
    shared = cast(Literal["flexible"] | None, split)  # checked by the first plan
    cost = as_cost(seconds_per_token, seconds_per_active_expert, tile, tokens_per_step)
    ways = {"policy": checked, "split": shared, "cost": cost}
    sizes = {
        "recent": as_count("window", window),
        "remembered": as_count("memory", memory, least=0),
    }
    planners = {
        x: plan_from_history(topology, strategy=x, **ways, **limits, **sizes) for x in names
    }
    planners[LAST_WINDOW] = plan_from_last_window(topology, policy=checked)
    none = without_balancer(counts, topology, window=window, cost=cost)
    results = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        for name, planner in planners.items():
            advance = partial(bar.advance, bar.add_task(name, total=len(none.imbalance)))
            results[name] = replay(
                counts,
                planner,
                topology,
                window=window,
                every=every,
                all_past=True,
                split=shared,
                cost=cost,
                on_window=advance,
            )
    results[NO_BALANCER] = none
    reference = None if cost is None else none
    arguments = {k: v for k, v in ctx.params.items() if k not in ("plot", "json_file")}
    arguments["strategy"] = names
    tables = Console(stderr=json_file == STDOUT)
    tables.print(table(results, arguments, counts.shape, reference))
    if spares is not None:
        tables.print(_curves(counts, topology, numbers_in("--spares", spares)))
    if json_file is not None:
        text = as_json(results, arguments, counts.shape, order[window:], reference)
        write_bytes(json_file, text.encode())
    if plot is not None:
        from eplb_jax.cli.picture import picture_of_replays

        time = "window" if shuffle is None else "window, in the order of the replay"
        shown = names[0], LAST_WINDOW
        write_figure(plot, picture_of_replays(results, shown, NO_BALANCER, window, time))


def _curves(counts: np.ndarray, topology: Topology, slots: list[int]) -> Table:
    """Imbalance against slots, with equal shares and with a flexible split."""
    seen = len(counts) - max(1, len(counts) // 4)
    table = Table("slots of a GPU", "spare slots", title="what more slots are worth, next windows")
    curves = [
        spares_curve(counts[:seen], counts[seen:], topology, slots, split=split)
        for split in (None, "flexible")
    ]
    for header in ("equal shares", "flexible split"):
        table.add_column(header, justify="right")
    for points in zip(*curves, strict=True):
        each = points[0].slots_per_gpu
        spare = each * topology.num_gpus - counts.shape[2]
        table.add_row(str(each), str(spare), *(f"{x.imbalance:.2%}" for x in points))
    return table
