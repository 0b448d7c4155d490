"""`eplb-jax plan`: one plan from measured loads."""

from functools import partial
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Annotated, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Context, Option

from eplb_jax.cli.arguments import Gpus, Groups, Load, Nodes, Plot, PolicyName, Replicas, read
from eplb_jax.cli.files import check_drawable, check_writable, write_figure, write_whole
from eplb_jax.evaluation.metrics import Balance, balance, balance_of, gap, gpu_loads_in_order
from eplb_jax.evaluation.replay import time_plan
from eplb_jax.planning.plan import plan as make_plan
from eplb_jax.planning.policy import Policy, resolve_policy
from eplb_jax.planning.strategies import STRATEGIES
from eplb_jax.types import Topology


def plan(
    ctx: Context,
    load: Load,
    num_replicas: Replicas,
    num_gpus: Gpus,
    num_groups: Groups = 1,
    num_nodes: Nodes = 1,
    policy: PolicyName = "auto",
    strategy: Annotated[str, Option(help=f"One of: {', '.join(STRATEGIES)}.")] = "auto",
    seed: Annotated[int, Option(help="Seed of strategies that draw at random.")] = 0,
    total: Annotated[bool, Option("--sum", help="Plan for the sum of the windows.")] = False,
    output: Annotated[Path | None, Option("-o", "--output", help="JSON file to write.")] = None,
    plot: Plot = None,
) -> None:
    """Plan the expert of every slot, and print how balanced the GPUs are.

    The plan is made for all windows of the load, and balance is the mean over them.
    """
    check_writable(output)
    check_drawable(plot)
    loads = read(load)
    if total and loads.ndim == 3:
        loads = loads.sum(axis=0)
    topology = Topology.of_replicas(num_replicas, num_gpus, num_nodes, num_groups)
    chosen = resolve_policy(cast(Policy, policy), num_groups, num_nodes)
    options = {"policy": chosen, "strategy": strategy, "key": jax.random.key(seed)}
    placement, seconds, compile_seconds = time_plan(partial(make_plan, loads, topology, **options))
    before = balance_of(jnp.asarray(gpu_loads_in_order(loads, num_gpus), jnp.float32))
    after = balance(loads, placement, topology)
    console = Console(highlight=False)
    console.print(_table(loads.shape, before, after, gap(loads, placement, topology)))
    if chosen != policy and num_nodes > 1:
        divides = "divide" if chosen == "hierarchical" else "do not divide"
        console.print(f"policy: {chosen}, as {num_nodes} nodes {divides} {num_groups} groups")
    device = jax.devices()[0]
    console.print(
        f"compiled in {compile_seconds:.2f} s, planned in {seconds * 1e3:.1f} ms on "
        f"{device.platform} ({device.device_kind})"
    )
    if output is not None:
        used = {k: v for k, v in ctx.params.items() if k not in ("total", "output", "plot")}
        used |= {"eplb_jax": version("eplb-jax"), "policy": chosen}
        used |= {"balancedness": round(float(after.mean_balancedness), 6)}
        listed = placement.log2phy[..., : int(placement.logcnt.max())]
        maps = placement._replace(log2phy=listed)._asdict()
        text = dumps(used | {name: value.tolist() for name, value in maps.items()})
        write_whole(output, lambda file: file.write(text.encode()))
    if plot is not None:
        from eplb_jax.cli.picture import picture_of_plan

        write_figure(plot, picture_of_plan(before, after))


def _table(shape: tuple[int, ...], before: Balance, after: Balance, gaps: jax.Array) -> Table:
    windows = f", mean over {shape[0]} windows" if len(shape) == 3 else ""
    title = f"{shape[-2]} layers x {shape[-1]} experts{windows}"
    table = Table("", title=title, title_justify="left")
    for header in ("no balancer", "plan"):
        table.add_column(header, justify="right")
    both = before, after
    mean = (f"{x.mean_balancedness:.4f}" for x in both)
    layers = [_by_layer(x.imbalance) for x in both]
    table.add_row("balancedness (mean / max GPU load)", *mean)
    table.add_row("imbalance (max / mean GPU load - 1)", *(f"{x.mean():.2%}" for x in layers))
    table.add_row("worst layer, its imbalance", *(f"{x.argmax()}, {x.max():.2%}" for x in layers))
    above = _by_layer(gaps)
    bound = f"{above.mean():.2%}, {above.max():.2%}"
    table.add_row("above the proven bound (mean, worst layer)", "", bound)
    return table


def _by_layer(values: jax.Array) -> np.ndarray:
    """The mean over windows."""
    return np.asarray(values).reshape(-1, values.shape[-1]).mean(axis=0)
