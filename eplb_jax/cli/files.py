"""Files that appear complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_writable(path: Path | None) -> None:
    """Raise ValueError where no such file can be, before the work is done."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.absolute().parent} does not exist")
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder")


def check_drawable(path: Path | None) -> None:
    """The same for pictures, whose suffix must be one that can be drawn."""
    check_writable(path)
    if path is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        if _kind(path) not in FigureCanvasBase.get_supported_filetypes():
            raise ValueError(f"{path}: unknown kind of picture; use .png, .svg or .pdf")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it appears complete or not at all."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_figure(path: Path, figure: "Figure") -> None:
    """Draw to a file, as its suffix says; without one, PNG."""
    write_whole(path, lambda file: figure.savefig(file, format=_kind(path), dpi=150))


def _kind(path: Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"
