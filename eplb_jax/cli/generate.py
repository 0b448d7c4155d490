"""`eplb-jax generate`: a synthetic trace."""

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
from typer import Argument, Context, Option, echo

from eplb_jax.cli.files import check_writable
from eplb_jax.evaluation import traces
from eplb_jax.files import write_whole

KINDS = ", ".join(get_args(traces.Kind))


def generate(
    ctx: Context,
    kind: Annotated[str, Argument(metavar="KIND", help=f"One of: {KINDS}.")],
    output: Annotated[Path, Option("-o", "--output", help="File to write, .npz or .npy.")],
    num_windows: Annotated[int, Option("--windows", help="Windows of time.")],
    num_layers: Annotated[int, Option("--layers", help="MoE layers.")],
    num_experts: Annotated[int, Option("--experts", help="Experts of a layer.")],
    tokens: Annotated[int, Option(help="Tokens of a window.")] = 8192,
    top_k: Annotated[int, Option(help="Experts that a token is routed to.")] = 8,
    skew: Annotated[float, Option(help="Standard deviation of log popularity.")] = 1.0,
    balancedness: Annotated[
        float | None, Option(help="Instead of --skew: mean / max GPU load without a balancer.")
    ] = None,
    num_gpus: Annotated[int | None, Option("--gpus", help="GPUs for --balancedness.")] = None,
    change: Annotated[float | None, Option(help="Change per window; depends on the kind.")] = None,
    topics: Annotated[int, Option(help="Number of topics, for that kind.")] = 4,
    seed: Annotated[int, Option(help="Seed of all random draws.")] = 0,
) -> None:
    """Write a synthetic trace [windows, layers, experts] of routed tokens, for `simulate`."""
    check_writable(output)
    if output.suffix not in (".npz", ".npy"):
        raise ValueError(f"{output}: unknown kind of file; use one of: .npz, .npy")
    # All options but the file are arguments of this name.
    load = traces.generate(**{k: v for k, v in ctx.params.items() if k != "output"})
    if output.suffix == ".npz":
        write_whole(output, lambda file: np.savez_compressed(file, load=load))
    else:
        write_whole(output, lambda file: np.save(file, load))
    balanced = traces.balancedness_of(load, num_gpus or num_experts)
    gpus = f"{num_gpus} GPUs" if num_gpus else "one expert per GPU"
    echo(
        f"{output}: {num_windows} windows x {num_layers} layers x {num_experts} experts; "
        f"balancedness without a balancer, {gpus}: {balanced:.3f}"
    )
