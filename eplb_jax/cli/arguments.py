"""Arguments that commands share, and how their errors are told."""

import contextlib
from collections.abc import Iterator
from typing import Annotated, get_args

import numpy as np
import typer

from eplb_jax.evaluation import loads
from eplb_jax.planning.plan import Policy

FILES = f"a .npz, .npy, .json or .csv file, 'example', or one of: {', '.join(loads.EXAMPLES)}"

Replicas = Annotated[int, typer.Option(help="Physical slots of a layer, over all GPUs.")]
Gpus = Annotated[int, typer.Option(help="GPUs, over all nodes.")]
Groups = Annotated[int, typer.Option(help="Groups of experts.")]
Nodes = Annotated[int, typer.Option(help="Nodes.")]
PolicyName = Annotated[str, typer.Option(help=f"One of: {', '.join(get_args(Policy))}.")]


def load_of(name: str) -> np.ndarray:
    """A bundled load by its name, or what a file holds."""
    if name == "example":
        return loads.example()
    return loads.example(name) if name in loads.EXAMPLES else loads.read(name)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tell an error in one line, and exit with 2."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, OSError) as error:
        typer.echo(f"eplb-jax: error: {error}", err=True)
        raise typer.Exit(2) from None
