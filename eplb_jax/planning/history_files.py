"""Histories in files: a service restarts with what it knew."""

import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path

from eplb_jax.files import write_whole
from eplb_jax.planning.history import History, empty_history

_FORMAT = 1
"""Version of the format."""


def save_history(path: str | Path, history: History) -> None:
    """Write a history to one .npz file, completely or not at all.

    Args:
        path: The file, usually NAME.npz; replaced if it exists.
        history: What to save.

    Raises:
        OSError: The file cannot be written.
    """
    save_tree(path, history)


def save_tree(path: str | Path, tree: Any) -> None:
    """Write a pytree of named tuples to one .npz file, completely or not at all."""
    arrays: dict[str, Any] = {"version": np.int32(_FORMAT)}
    arrays |= {"/".join(_names(key)): np.asarray(x) for key, x in tree_leaves_with_path(tree)}
    write_whole(path, partial(np.savez_compressed, **arrays))


def load_history(path: str | Path) -> History:
    """A history that `save_history` wrote, bit for bit.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no history, or of another version of the format.

    Example:
        >>> load_history("history.npz").recent.shape  # doctest: +SKIP
        (8, 58, 256)
    """
    return load_tree(path, empty_history(1, 0, 0, 1), "history", "save_history")


def load_tree(path: str | Path, like: Any, kind: str, writer: str) -> Any:
    """A pytree that `save_tree` wrote, of the structure of another.

    Args:
        path: The file.
        like: A pytree of the same structure.
        kind: What the file should hold, for errors.
        writer: The function that writes it, for errors.
    """
    try:
        with np.load(path) as file:
            stored = dict(file)
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no {kind}: {error}") from error
    if stored.pop("version", None) != _FORMAT:
        raise ValueError(f"{path} is no {kind} of format {_FORMAT}; {writer} writes it")
    names = ["/".join(_names(key)) for key, _ in tree_leaves_with_path(like)]
    missing = sorted(set(names) - set(stored))
    if missing:
        raise ValueError(f"{path} is no whole {kind}: {missing[0]} is missing")
    leaves = [jnp.asarray(stored[name]) for name in names]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _names(path: Sequence[Any]) -> list[str]:
    return [key.name for key in path]
