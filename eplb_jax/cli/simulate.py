"""`eplb-jax simulate`: a trace replayed under several strategies."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eplb_jax.cli.arguments import FILES, Gpus, Groups, Nodes, PolicyName, Replicas, load_of, told
from eplb_jax.cli.files import check_drawable, check_writable, write_figure, write_whole
from eplb_jax.cli.report import report, table
from eplb_jax.evaluation.replay import (
    Plan,
    Replay,
    all_windows,
    last_window,
    replay,
    without_balancer,
)
from eplb_jax.planning.plan import Policy
from eplb_jax.planning.strategies import STRATEGIES, resolve_strategy

LAST_WINDOW, NO_BALANCER = "deepseek, last window", "no balancer"


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help=f"Measured load, [windows, layers, experts], oldest window first: {FILES}.",
        ),
    ],
    replicas: Replicas,
    gpus: Gpus,
    groups: Groups = 1,
    nodes: Nodes = 1,
    policy: PolicyName = "auto",
    window: Annotated[int, typer.Option(help="Past windows that a plan is made from.")] = 8,
    every: Annotated[int, typer.Option(help="Windows that a plan stays in place for.")] = 1,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of: {', '.join(STRATEGIES)}; may be repeated.", show_default="auto"
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option(help="Leave experts on their GPU where that can be.")
    ] = True,
    max_moves: Annotated[
        int | None, typer.Option(help="Most slots of a layer that a new plan fetches.")
    ] = None,
    price: Annotated[
        float, typer.Option(help="Imbalance of its layer that a fetched slot costs.")
    ] = 0.0,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="Replay the windows in a random order.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw imbalance and GPU loads there (.png, .svg, .pdf).")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all numbers there; - for stdout."),
    ] = None,
) -> None:
    """Replay a trace: plan from past windows, and measure each plan on those that follow."""
    names = tuple(dict.fromkeys(strategy or ["auto"]))
    arguments = {
        "trace": trace,
        "num_replicas": replicas,
        "num_groups": groups,
        "num_nodes": nodes,
        "num_gpus": gpus,
        "policy": policy,
        "window": window,
        "every": every,
        "strategy": names,
        "keep": keep,
        "max_moves": max_moves,
        "price": price,
        "shuffle": shuffle,
    }
    with told():
        to_stdout = json_file == Path("-")
        check_writable(None if to_stdout else json_file)
        check_drawable(plot)
        counts = load_of(trace)
        if counts.ndim != 3:
            raise ValueError(
                f"{trace} has the shape {counts.shape}; a trace is [windows, layers, experts]"
            )
        order = np.arange(len(counts))
        if shuffle is not None:
            order = np.random.default_rng(shuffle).permutation(len(counts))
        sizes = replicas, groups, nodes, gpus
        checked = cast(Policy, policy)  # by every plan
        plans = {
            name: all_windows(
                *sizes,
                keep=keep,
                policy=checked,
                strategy=resolve_strategy(name),
                max_moves=max_moves,
                price=price,
            )
            for name in names
        }
        plans[LAST_WINDOW] = last_window(*sizes, policy=checked)
        results = _replayed(counts[order], plans, num_gpus=gpus, window=window, every=every)
        Console(stderr=to_stdout).print(table(results, counts.shape, replicas, window, every))
        if json_file is not None:
            text = report(results, arguments, replicas, counts.shape, order[window:])
            if to_stdout:
                typer.echo(text)
            else:
                write_whole(json_file, lambda file: file.write(text.encode()))
        if plot is not None:
            from eplb_jax.cli.picture import picture

            time = "window" if shuffle is None else "window, in the order of the replay"
            shown = names[0], LAST_WINDOW
            write_figure(plot, picture(results, shown, NO_BALANCER, window, time))


def _replayed(
    trace: np.ndarray, plans: dict[str, Plan], *, num_gpus: int, window: int, every: int
) -> dict[str, Replay]:
    none = without_balancer(trace, num_gpus=num_gpus, window=window)
    results = {}
    with _progress(len(none.imbalance)) as begun:
        for name, plan in plans.items():
            results[name] = replay(
                trace, plan, num_gpus=num_gpus, window=window, every=every, on_window=begun(name)
            )
    return results | {NO_BALANCER: none}


@contextmanager
def _progress(num_windows: int) -> Iterator[Callable[[str], Callable[[], None]]]:
    """A bar on the terminal, none elsewhere; it begins anew with every name."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=num_windows)

        def begun(name: str) -> Callable[[], None]:
            bar.reset(task, description=name)
            return lambda: bar.advance(task)

        yield begun
