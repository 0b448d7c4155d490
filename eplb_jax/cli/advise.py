"""`eplb-jax advise`: what to choose for a trace."""

from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import (
    Gpus,
    Groups,
    Json,
    Load,
    LoadFormat,
    Nodes,
    SecondsPerActiveExpert,
    SecondsPerToken,
    Tile,
    TokensPerStep,
    as_cost,
    numbers_in,
)
from eplb_jax.cli.files import STDOUT, check_writable, write_json
from eplb_jax.evaluation.advice import Advice
from eplb_jax.evaluation.advice import advise as advise_on
from eplb_jax.evaluation.cost_fit import fit_cost
from eplb_jax.planning.cost import Cost
from eplb_jax.types import Topology

_SPARES = 2
"""Spare slots of a GPU that are tried where none are named."""


def advise(
    trace: Load,
    num_gpus: Gpus,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    slots: Annotated[
        str | None, Option(help="Slots of a GPU to try, such as 4-6; default: up to two spare.")
    ] = None,
    window: Annotated[
        int | None, Option(help="Windows before the first that is measured; default: a quarter.")
    ] = None,
    seconds: Annotated[
        str | None,
        Option(metavar="FILE", help="Measured seconds of every window, or of every GPU in it."),
    ] = None,
    previous: Annotated[
        str | None, Option(metavar="PLAN", help="Plan that was in place when they were measured.")
    ] = None,
    seconds_per_token: SecondsPerToken = None,
    seconds_per_active_expert: SecondsPerActiveExpert = None,
    tile: Tile = None,
    tokens_per_step: TokensPerStep = None,
    format: LoadFormat = None,
    json_file: Json = None,
) -> None:
    """Advise on spares, split, past windows and how often to plan, from replays of a trace."""
    check_writable(json_file, (trace, seconds, previous))
    if (seconds is None) != (previous is None):
        raise ValueError("give --seconds and --previous together, or neither")
    recording = inputs.read_loads(trace, format)
    counts = recording.load
    console = Console(highlight=False, stderr=json_file == STDOUT)
    cost = None
    if seconds is not None and previous is not None:
        in_place = inputs.read_plan(previous, num_gpus, num_nodes, num_groups)
        both = inputs.same_layers(recording, in_place, previous)
        measured = inputs.read_seconds(seconds)
        units = {"tile": 1 if tile is None else tile, "tokens_per_step": tokens_per_step}
        topology = inputs.topology_of(in_place)
        fit = fit_cost(both.load, both.phy2log, topology, measured, **units)
        if not fit.follows:
            reason = "does not follow" if fit.follows is False else "is not shown to follow"
            console.print(f"do not rebalance: measured time {reason} the load of the slowest GPU")
            write_json(json_file, {"rebalance": False, "evidence": fit.evidence})
            return
        cost = fit.cost
    else:
        cost = as_cost(seconds_per_token, seconds_per_active_expert, tile, tokens_per_step)
    if isinstance(cost, Cost) and cost.is_proportional:
        cost = None
    least = -(-counts.shape[2] // num_gpus)
    sizes = None if slots is None else numbers_in("--slots", slots)
    most = least + _SPARES if sizes is None else max(sizes)
    topology = Topology(num_gpus, most, num_nodes, num_groups)
    progress = Console(stderr=True)
    with progress.status("replaying") as status:
        advice = advise_on(
            counts,
            topology,
            slots=sizes,
            window=window,
            cost=cost,
            on_replay=lambda name: status.update(f"replaying: {name}"),
        )
    console.print(_table(advice))
    console.print(_verdict(advice))
    write_json(json_file, advice._asdict() | {"answers": [_as_dict(x) for x in advice.answers]})


def _as_dict(answer: tuple) -> dict:
    question, choices, chosen = answer
    rows = [x._asdict() for x in choices]
    return {"question": question, "chosen": choices[chosen].name, "choices": rows}


def _table(advice: Advice) -> Table:
    table = Table(
        title=f"{advice.windows} windows that plans were not made from",
        caption="time: of the slowest GPUs / without a balancer; error: standard error of the "
        "difference to the best; moved: slots of a layer filled from other GPUs, per window",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("")
    for header in ("time", "error", "moved"):
        table.add_column(header, justify="right")
    for question, choices, chosen in advice.answers:
        for i, x in enumerate(choices):
            name = f"[bold]{x.name}[/bold], chosen" if i == chosen else x.name
            row = f"{x.time:.3f}", f"{x.error:.3f}", f"{x.moves:.1f}"
            table.add_row("" if i else question, name, *row, end_section=i == len(choices) - 1)
    return table


def _verdict(advice: Advice) -> str:
    """The answer in a sentence."""
    time = f"{advice.time:.3f} of the time without a balancer, standard error {advice.error:.3f}"
    if not advice.rebalance:
        return f"do not rebalance: {time}"
    names = {x.question: x.choices[x.chosen].name for x in advice.answers}
    once = names["windows from plan to plan"] == "only one plan"
    return f"{'plan once' if once else 'rebalance'}: {time}"
