"""`eplb-jax decide`: whether a new plan is worth moving to."""

from typing import Annotated

import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Option

from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import (
    Json,
    Load,
    LoadFormat,
    MaybeGpus,
    Nodes,
    SecondsPerActiveExpert,
    SecondsPerToken,
    Tile,
    TokensPerStep,
    as_cost,
)
from eplb_jax.cli.files import STDOUT, check_writable, write_json
from eplb_jax.cli.moves import New, Old, moved
from eplb_jax.evaluation.cost_fit import fit_cost
from eplb_jax.evaluation.decision import decide as decide_on
from eplb_jax.evaluation.step_time import CostFit
from eplb_jax.transition.moves import moves

_SHOWN = 5
"""Number of layers that are listed."""


def decide(
    load: Load,
    old: Old,
    new: New,
    bytes_per_expert: Annotated[int, Option(help="Size of one expert of one layer.")],
    bandwidth: Annotated[float, Option(help="Bytes per second that a GPU sends, and receives.")],
    seconds_per_token: SecondsPerToken = None,
    seconds_per_active_expert: SecondsPerActiveExpert = None,
    seconds: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Measured seconds of every window, or of every GPU in it, with OLD in place; in "
            "place of the times of tokens and experts.",
        ),
    ] = None,
    tile: Tile = None,
    tokens_per_step: TokensPerStep = None,
    serves: Annotated[float, Option(help="Windows that the new plan will stay in place.")] = 1,
    num_gpus: MaybeGpus = None,
    num_nodes: Nodes = 1,
    format: LoadFormat = None,
    json_file: Json = None,
) -> None:
    """Weigh the time that a new plan saves against the time to move to it.

    LOAD should be windows that the new plan was not made from, and at least two of them.
    """
    check_writable(json_file, (load, old, new, seconds))
    if (seconds is None) == (seconds_per_token is None and seconds_per_active_expert is None):
        raise ValueError(
            "give either --seconds, or --seconds-per-token and --seconds-per-active-expert"
        )
    before, after, _ = inputs.two_plans(old, new, num_gpus, num_nodes)
    topology = inputs.topology_of(after)
    recording = inputs.read_loads(load, format)
    both = inputs.same_layers(recording, after, new)
    old_map = inputs.same_layers(recording, before, old).phy2log
    if seconds is not None:
        units = {"tile": 1 if tile is None else tile, "tokens_per_step": tokens_per_step}
        cost = fit_cost(both.load, old_map, topology, inputs.read_seconds(seconds), **units)
    else:
        cost = as_cost(seconds_per_token, seconds_per_active_expert, tile, tokens_per_step)
    answer = decide_on(
        both.load,
        old_map,
        both.phy2log,
        topology,
        bytes_per_expert=bytes_per_expert,
        bandwidth=bandwidth,
        serves=serves,
        cost=cost,
    )
    console = Console(highlight=False, stderr=json_file == STDOUT)
    follows = not isinstance(cost, CostFit) or cost.follows
    console.print(f"{answer.action}: {_reason(answer.action, len(both.load), follows)}")
    console.print(moved(moves(old_map, both.phy2log, topology)))
    table = Table("", "", show_header=False)
    table.add_row("saved in a window", f"{answer.gain:.4g} s, standard error {answer.error:.2g} s")
    table.add_row("time to move", f"{answer.cost:.4g} s")
    table.add_row("pays back after", f"{answer.payback:.3g} windows of {serves:g}")
    if isinstance(cost, CostFit):
        for name, value, error in zip(cost.value._fields, cost.value, cost.error, strict=True):
            if np.isfinite(error):
                table.add_row(f"fitted {name}", f"{value:.4g}, standard error {error:.2g}")
    first = ", ".join(str(both.layers[x]) for x in answer.order[:_SHOWN])
    table.add_row("layers with the most gain per byte", first)
    console.print(table)
    named = answer._asdict() | {"layers": both.layers}
    write_json(json_file, named | {"order": [both.layers[x] for x in answer.order]})


def _reason(action: str, windows: int, follows: bool | None) -> str:
    if follows is False:
        return "measured time does not follow the load of the most loaded GPU"
    if action == "apply":
        return "the new plan saves more than moving to it costs"
    if action == "keep":
        return "the new plan saves less than moving to it costs"
    if windows < 2:
        return "one window says nothing of the spread; keep the plan in place and give more windows"
    if follows is None:
        return "these windows do not tell whether time follows the load; give more of them"
    return "the saving is within its error of the cost; keep the plan in place for now"
