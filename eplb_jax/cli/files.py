"""Output files of commands, checked before the work is done."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from eplb_jax import formats
from eplb_jax.cli.arguments import WRITTEN
from eplb_jax.files import write_whole
from eplb_jax.formats import PlanFile
from eplb_jax.formats.plans import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STDOUT = Path("-")
PICTURES = (".png", ".svg", ".pdf")
PLANS = {".json": "eplb-jax", ".yaml": "tensorrt-llm", ".yml": "tensorrt-llm"}
"""The format of a plan file by its suffix."""


def check_writable(path: Path | None, inputs: Sequence[str | Path | None] = ()) -> None:
    """Raise ValueError if the file cannot be created, or is one that is read."""
    if path is None or path == STDOUT:
        return
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.absolute().parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    for name in inputs:
        if name is not None and path.exists() and Path(name).exists() and path.samefile(name):
            raise ValueError(f"{path} is read and would be overwritten; write to another file")


def check_drawable(path: Path | None, inputs: Sequence[str | Path | None] = ()) -> None:
    """`check_writable` for a picture, whose suffix must name a format that can be drawn."""
    check_writable(path, inputs)
    if path is not None and path.suffix.lower() not in PICTURES:
        raise ValueError(f"{path}: unknown kind of picture; use one of: {', '.join(PICTURES)}")


def plan_format(path: Path | None, to: str | None) -> str:
    """The format of a plan file that is written: the one named, or that of its suffix.

    Raises:
        ValueError: Neither says which.
    """
    if to is None and path is not None and path != STDOUT:
        if path.suffix.lower() not in PLANS:
            raise ValueError(
                f"{path}: the suffix {path.suffix!r} names no format of plans; "
                f"use .json or .yaml, or --to: {WRITTEN}"
            )
        to = PLANS[path.suffix.lower()]
    to = "eplb-jax" if to is None else to
    if to not in WRITTEN.split(", "):
        raise ValueError(f"--to={to} cannot be written; choose one of: {WRITTEN}")
    return to


def write_plan(path: Path, plan: PlanFile, format: str, more: dict[str, Any] | None = None) -> None:
    """Write a plan; `more` goes into plan files of this project, beside what they need."""
    if format == "eplb-jax" and more is not None:
        content = json.dumps(to_json(plan) | more).encode()
    else:
        content = formats.write_plan(plan, format)
    write_bytes(path, content)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write numbers to a file; None: nowhere."""
    if path is not None:
        write_bytes(path, json.dumps(content, default=_plain).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a file completely or not at all, or to standard output."""
    if path == STDOUT:
        typer.echo(content)
    else:
        write_whole(path, lambda file: file.write(content))


def write_figure(path: Path, figure: "Figure") -> None:
    """Draw to a file in the format of its suffix."""
    kind = path.suffix.lstrip(".").lower()
    write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=150))


def _plain(value: Any) -> Any:
    """Arrays, tuples and paths for JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
