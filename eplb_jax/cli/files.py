"""Output files, written completely or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_writable(path: Path | None) -> None:
    """Raise ValueError if the file cannot be created, before the work is done."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.absolute().parent} does not exist")
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder")


def check_drawable(path: Path | None) -> None:
    """`check_writable` for a picture, whose suffix must name a format that can be drawn."""
    check_writable(path)
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        if _format(path) not in FigureCanvasBase.get_supported_filetypes():
            raise ValueError(f"{path}: unknown kind of picture; use .png, .svg or .pdf")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, and rename it when it is complete."""
    part = path.absolute().with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_figure(path: Path, figure: "Figure") -> None:
    """Draw to a file in the format of its suffix; PNG without one."""
    write_whole(path, lambda file: figure.savefig(file, format=_format(path), dpi=150))


def _format(path: Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"
