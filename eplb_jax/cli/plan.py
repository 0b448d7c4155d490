"""`eplb-jax plan`: one plan from one measured load."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from eplb_jax.cli.arguments import FILES, Gpus, Groups, Nodes, PolicyName, Replicas, load_of, told
from eplb_jax.cli.files import check_drawable, check_writable, write_figure, write_whole
from eplb_jax.evaluation.metrics import Balance, balance, evenness, gap
from eplb_jax.evaluation.replay import in_order, timed
from eplb_jax.planning.placement import check_placement
from eplb_jax.planning.plan import Policy, rebalance_experts, resolve_policy
from eplb_jax.planning.strategies import STRATEGIES
from eplb_jax.types import Placement


def plan(
    load: Annotated[
        str,
        typer.Argument(
            metavar="LOAD",
            help="Measured load, [layers, experts] or [windows, layers, experts] (summed): "
            f"{FILES}.",
        ),
    ],
    replicas: Replicas,
    gpus: Gpus,
    groups: Groups = 1,
    nodes: Nodes = 1,
    policy: PolicyName = "auto",
    strategy: Annotated[str, typer.Option(help=f"One of: {', '.join(STRATEGIES)}.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of strategies that draw at random.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan there, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw GPU loads before and after there (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Plan where the replicas of every expert lie, and say how balanced that is."""
    with told():
        check_writable(output)
        check_drawable(plot)
        windows = load_of(load)
        counts = windows.sum(axis=0) if windows.ndim == 3 else windows

        def make() -> Placement:
            return rebalance_experts(
                counts,
                replicas,
                groups,
                nodes,
                gpus,
                policy=cast(Policy, policy),  # checked there
                strategy=strategy,
                key=jax.random.key(seed),
            )

        placement, first = timed(make)
        _, again = timed(make)
        check_placement(placement)
        before, after = _unplanned(counts, gpus), balance(counts, placement, gpus)
        _print_table(counts.shape, before, after, gap(counts, placement, gpus))
        used = resolve_policy(cast(Policy, policy), groups, nodes)
        if used != policy:
            parted = "divide" if used == "hierarchical" else "do not divide"
            console = Console()
            console.print(
                f"policy: {used}, as {nodes} nodes {parted} {groups} groups", highlight=False
            )
        _print_times(first - again, again)
        if output is not None:
            described = {
                "eplb_jax": version("eplb-jax"),
                "load": load,
                "num_replicas": replicas,
                "num_groups": groups,
                "num_nodes": nodes,
                "num_gpus": gpus,
                "policy": used,
                "strategy": strategy,
                "seed": seed,
                "balancedness": round(float(after.mean_balancedness), 6),
            }
            text = json.dumps(described | _maps(placement))
            write_whole(output, lambda file: file.write(text.encode()))
        if plot is not None:
            _draw(plot, before, after)


def _unplanned(counts: np.ndarray, num_gpus: int) -> Balance:
    """No replicas, expert e on GPU e * G // E: what a model does without a balancer."""
    return evenness(jnp.asarray(in_order(counts, num_gpus), jnp.float32))


def _print_table(
    shape: tuple[int, ...], before: Balance, after: Balance, above_bound: jax.Array
) -> None:
    table = Table(title=f"{shape[0]} layers x {shape[1]} experts", title_justify="left")
    table.add_column("")
    table.add_column("no balancer", justify="right")
    table.add_column("plan", justify="right")
    both = before, after
    table.add_row(
        "balancedness (mean / heaviest GPU)", *(f"{b.mean_balancedness:.4f}" for b in both)
    )
    table.add_row("imbalance (heaviest / mean GPU - 1)", *(f"{b.mean_imbalance:.2%}" for b in both))
    worst = [int(jnp.argmax(b.imbalance)) for b in both]
    table.add_row(
        "worst layer, its imbalance",
        *(f"{w}, {b.imbalance[w]:.2%}" for w, b in zip(worst, both, strict=True)),
    )
    table.add_row(
        "above the proven bound (mean, worst layer)",
        "",
        f"{jnp.mean(above_bound):.2%}, {jnp.max(above_bound):.2%}",
    )
    Console().print(table)


def _print_times(compile_s: float, run_s: float) -> None:
    device = jax.devices()[0]
    Console().print(
        f"compiled in {compile_s:.2f} s, planned in {run_s * 1e3:.1f} ms on "
        f"{device.platform} ({device.device_kind})",
        highlight=False,
    )


def _maps(placement: Placement) -> dict[str, list[object]]:
    """The maps as nested lists, the slots of an expert trimmed to the most that one has."""
    phy2log, log2phy, logcnt = (np.asarray(x) for x in placement)
    most = logcnt.max(initial=1)
    return {
        "phy2log": phy2log.tolist(),
        "log2phy": log2phy[:, :, :most].tolist(),
        "logcnt": logcnt.tolist(),
    }


def _draw(path: Path, before: Balance, after: Balance) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layer = int(jnp.argmax(before.imbalance))
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        one, every = figure.subplots(2, 1)
        for axes, title, xlabel in (
            (one, f"GPUs of layer {layer}, the worst without a balancer", "GPU"),
            (every, "Heaviest GPU of every layer", "layer"),
        ):
            axes.set(title=title, xlabel=xlabel, ylabel="load / mean GPU")
            axes.axhline(1, color="black", linewidth=0.8, zorder=3)
        for shift, balanced, label, color in (
            (-0.2, before, "no balancer", "#b9b9b9"),
            (0.2, after, "plan", "#1f77b4"),
        ):
            gpu_load = np.asarray(balanced.gpu_load)
            mean = gpu_load.mean(axis=1, keepdims=True)
            ratio = gpu_load / np.where(mean > 0, mean, 1)
            for axes, heights in ((one, ratio[layer]), (every, ratio.max(axis=1))):
                axes.bar(np.arange(heights.size) + shift, heights, 0.4, color=color, label=label)
        for axes in (one, every):
            axes.margins(x=0.01)
        one.legend(frameon=False, loc="upper right")
        write_figure(path, figure)
