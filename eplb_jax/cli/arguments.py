"""Arguments that commands share."""

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
from typer import Argument, Option

from eplb_jax import formats
from eplb_jax.evaluation import loads
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.policy import Policy

FILES = f"a file or folder of a known format, 'example', or one of: {', '.join(loads.EXAMPLES)}"
SHAPES = "[layers, experts], or [windows, layers, experts] with the oldest window first"
WRITTEN = ", ".join(name for name, x in formats.FORMATS.items() if x.write_plan is not None)

Load = Annotated[str, Argument(metavar="LOAD", help=f"Measured loads, {SHAPES}: {FILES}.")]
LoadFormat = Annotated[
    str | None,
    Option("--format", help=f"Format of LOAD, if it is not clear: {', '.join(formats.FORMATS)}."),
]
_REPLICAS = Option("--replicas", help="Physical slots of a layer, over all GPUs.")
_GPUS = Option("--gpus", help="GPUs, over all nodes.")
Replicas = Annotated[int, _REPLICAS]
Gpus = Annotated[int, _GPUS]
MaybeReplicas = Annotated[int | None, _REPLICAS]
MaybeGpus = Annotated[int | None, _GPUS]
Groups = Annotated[int, Option("--groups", help="Groups of experts.")]
Nodes = Annotated[int, Option("--nodes", help="Nodes.")]
Plot = Annotated[Path | None, Option(help="Picture of GPU loads to write (.png, .svg, .pdf).")]
PolicyName = Annotated[str, Option(help=f"One of: {', '.join(get_args(Policy))}.")]
Json = Annotated[
    Path | None, Option("--json", help="File to write all numbers to; - for standard output.")
]
Split = Annotated[
    str | None,
    Option(help='"flexible": replicas share the load at hand as it wants; default: equally.'),
]
SecondsPerToken = Annotated[
    float | None, Option(help="Time of one token of one expert on a GPU, in seconds.")
]
SecondsPerActiveExpert = Annotated[
    float | None, Option(help="Time of a replica with any token in a step, in seconds.")
]
Tile = Annotated[
    int | None, Option(help="Tokens are rounded up to a multiple of it.", show_default="1")
]
TokensPerStep = Annotated[
    float | None,
    Option(help="Tokens of a layer in a step, over all experts; default: a window is a step."),
]
To = Annotated[
    str | None,
    Option("--to", help=f"Format of the plan that is written: {WRITTEN}. Default: by its suffix."),
]


def numbers_in(name: str, text: str) -> list[int]:
    """The numbers of a list of ranges, such as 0-5,7.

    Raises:
        ValueError: It is no such list.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{name}={text!r} is not a list of numbers such as 0-5,7")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def as_cost(
    seconds_per_token: float | None,
    seconds_per_active_expert: float | None,
    tile: int | None,
    tokens_per_step: float | None,
) -> Cost | None:
    """What the options of a cost say; None if none is given.

    Raises:
        ValueError: There is a tile or a number of tokens, but no time.
    """
    if seconds_per_token is None and seconds_per_active_expert is None:
        if tile is not None or tokens_per_step is not None:
            raise ValueError(
                "--tile and --tokens-per-step need --seconds-per-token or "
                "--seconds-per-active-expert"
            )
        return None
    times = seconds_per_token or 0, seconds_per_active_expert or 0
    return Cost(*times, 1 if tile is None else tile, tokens_per_step)


def check_seed(seed: int) -> None:
    """Raise ValueError unless JAX can begin with this seed."""
    if not 0 <= seed < 2**63:
        nearest = 0 if seed < 0 else 2**63 - 1
        raise ValueError(f"--seed={seed} must be from 0 to 2^63 - 1; nearest: {nearest}")


def active_gpus(text: str | None, num_gpus: int) -> np.ndarray | None:
    """Whether every GPU is alive, from a list of those that are; None without a list.

    Raises:
        ValueError: It is no list, or has a GPU that there is not.
    """
    if text is None:
        return None
    alive = numbers_in("--active", text)
    if max(alive) >= num_gpus:
        raise ValueError(f"--active has GPU {max(alive)}; GPUs are numbered 0 to {num_gpus - 1}")
    return np.isin(np.arange(num_gpus), alive)
