"""Files that are written completely or not at all, and arrays that must fit in memory."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path`, and rename it when it is complete.

    A link stays a link: the file it names is replaced. What is not a regular file, such as a pipe
    or /dev/null, is written to directly.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with path.open("wb", buffering=0 if path.is_fifo() else -1) as file:
            write(file)
        return
    path = path.resolve()
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_memory(size: int) -> None:
    """Raise MemoryError if an array of so many bytes is larger than the memory of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise MemoryError(f"{size / 1e9:.1f} GB are wanted, and the machine has {memory / 1e9:.1f}")
