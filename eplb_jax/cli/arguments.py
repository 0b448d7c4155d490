"""Arguments that commands share."""

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
from typer import Argument, Option

from eplb_jax.evaluation import loads
from eplb_jax.planning.policy import Policy

FILES = f"a .npz, .npy, .json or .csv file, 'example', or one of: {', '.join(loads.EXAMPLES)}"
SHAPES = "[layers, experts], or [windows, layers, experts] with the oldest window first"

Load = Annotated[str, Argument(metavar="LOAD", help=f"Measured loads, {SHAPES}: {FILES}.")]
Replicas = Annotated[int, Option("--replicas", help="Physical slots of a layer, over all GPUs.")]
Gpus = Annotated[int, Option("--gpus", help="GPUs, over all nodes.")]
Groups = Annotated[int, Option("--groups", help="Groups of experts.")]
Nodes = Annotated[int, Option("--nodes", help="Nodes.")]
Plot = Annotated[Path | None, Option(help="Picture of GPU loads to write (.png, .svg, .pdf).")]
PolicyName = Annotated[str, Option(help=f"One of: {', '.join(get_args(Policy))}.")]


def read(name: str) -> np.ndarray:
    """The bundled loads of that name, or those in a file."""
    if name == "example":
        return loads.example()
    return loads.example(name) if name in loads.EXAMPLES else loads.read(name)
