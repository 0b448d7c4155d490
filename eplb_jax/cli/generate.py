"""`eplb-jax generate`: a made-up trace."""

from pathlib import Path
from typing import Annotated, cast, get_args

import numpy as np
import typer

from eplb_jax.cli.arguments import told
from eplb_jax.cli.files import check_writable, write_whole
from eplb_jax.evaluation import traces

KINDS = ", ".join(get_args(traces.Kind))


def generate(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of: {KINDS}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Write there: .npz or .npy.")],
    windows: Annotated[int, typer.Option(help="Windows of time.")],
    layers: Annotated[int, typer.Option(help="MoE layers.")],
    experts: Annotated[int, typer.Option(help="Experts of a layer.")],
    tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 8192,
    top_k: Annotated[int, typer.Option(help="Experts that a token is routed to.")] = 8,
    skew: Annotated[float, typer.Option(help="Standard deviation of log popularity.")] = 1.0,
    balancedness: Annotated[
        float | None,
        typer.Option(help="In place of --skew: mean / heaviest GPU without a balancer."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that --balancedness is about.")] = None,
    change: Annotated[
        float | None, typer.Option(help="How much changes in a window; it depends on the kind.")
    ] = None,
    topics: Annotated[int, typer.Option(help="How many topics, for that kind.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Make up a trace [windows, layers, experts] of routed tokens, to simulate on."""
    with told():
        check_writable(output)
        if output.suffix not in (".npz", ".npy"):
            raise ValueError(f"{output}: unknown kind of file; use one of: .npz, .npy")
        load = traces.generate(
            cast(traces.Kind, kind),  # checked there
            windows,
            layers,
            experts,
            tokens=tokens,
            top_k=top_k,
            skew=skew,
            balancedness=balancedness,
            num_gpus=gpus,
            change=change,
            topics=topics,
            seed=seed,
        )
        if output.suffix == ".npz":
            write_whole(output, lambda file: np.savez_compressed(file, load=load))
        else:
            write_whole(output, lambda file: np.save(file, load))
        even = traces.balancedness_of(load, gpus or experts)
        over = f"{gpus} GPUs" if gpus else "one expert a GPU"
        typer.echo(
            f"{output}: {windows} windows x {layers} layers x {experts} experts; "
            f"balancedness without a balancer, {over}: {even:.3f}"
        )
