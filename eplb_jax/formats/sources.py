"""A file or folder, opened by what it holds: its name does not matter."""

import csv
import io
import json
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eplb_jax.files import check_memory

Kind = Literal["folder", "json", "jsonl", "npz", "npy", "torch", "yaml", "table", "text"]


@dataclass(frozen=True)
class Source:
    """A file or folder whose content is parsed, but not yet understood.

    Attributes:
        path: The file or folder.
        kind: How it was parsed.
        content: folder: its files by name. json, yaml, torch: the value, with arrays in place of
            tensors. jsonl: a list of values, one for each line. npz: arrays by name. npy: the
            array, or what an array of one object holds. table: the cells of every line,
            list[list[str]]. text: the text.
    """

    path: Path
    kind: Kind
    content: Any

    @property
    def keys(self) -> frozenset[str]:
        """The keys of a mapping, as text; empty for anything else."""
        content = self.content if isinstance(self.content, Mapping) else {}
        return frozenset(str(key) for key in content)


def open_source(path: str | Path) -> Source:
    """Parse a file by its content.

    Raises:
        ValueError: The file is missing, not a regular file, empty or damaged.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            names = {x.name: x for x in sorted(path.iterdir()) if x.is_file()}
            return Source(path, "folder", names)
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file; write what it holds to a file first")
        return _parse(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply to be loads or a plan") from None
    except MemoryError as error:
        raise ValueError(f"{path}: does not fit in memory: {error}") from error


def _parse(path: Path) -> Source:
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if not head:
            raise ValueError(f"{path} is empty")
        try:
            if head.startswith(b"\x93NUMPY"):
                return Source(path, "npy", _read_npy(file, path.stat().st_size))
            if head.startswith(b"PK"):
                with zipfile.ZipFile(file) as archive:
                    if any(x.endswith("data.pkl") for x in archive.namelist()):
                        return Source(path, "torch", _read_torch(path))
                    return Source(path, "npz", _read_npz(archive))
            if head.startswith(b"\x80"):
                return Source(path, "torch", _read_torch(path))
        except (ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither text nor a file of arrays: {error}") from error
    return _parse_text(path, text)


def _parse_text(path: Path, text: str) -> Source:
    text = text.strip()
    if not text:
        raise ValueError(f"{path} is empty")
    if text[0] in "{[":
        try:
            return Source(path, "json", json.loads(text))
        except ValueError as error:
            lines = text.splitlines()
            if "Extra data" not in str(error):
                raise ValueError(f"{path} is not valid JSON: {error}") from error
        values = []
        for number, line in enumerate(lines, 1):
            try:
                values += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not valid JSON: {error}") from error
        return Source(path, "jsonl", values)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and (path.suffix in (".yaml", ".yml") or re.match(r"[\w-]+:(\s|$)", lines[0])):
        return Source(path, "yaml", _read_yaml(path, text))
    separator = next((x for x in ",\t;" if lines and x in lines[0]), None)
    if separator is None:
        return Source(path, "text", text)
    rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator)
    cells = [[cell.strip() for cell in row] for row in rows]
    widths = {len(row) for row in cells}
    if len(widths) == 1:
        return Source(path, "table", cells)
    if path.suffix in (".csv", ".tsv"):
        raise ValueError(
            f"{path} is not a table: its lines have {min(widths)} to {max(widths)} cells"
        )
    return Source(path, "text", text)


def _read_npz(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    arrays = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        with archive.open(entry) as file:
            try:
                arrays[name] = _read_npy(file, entry.file_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if not arrays:
        raise ValueError("it holds no array")
    return arrays


def _read_npy(file: Any, size: int) -> Any:
    """The array in a file of so many bytes, whose header may promise more than the file has."""
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        if shape != ():
            raise ValueError(f"it holds Python objects, of the shape {shape}")
        return _NumPyOnly(file).load().item()
    promised = dtype.itemsize * int(np.prod(shape, dtype=object))
    if promised > size:
        raise ValueError(f"its header promises {promised} bytes, but it has {size}")
    check_memory(promised)
    file.seek(0)
    return np.load(file, allow_pickle=False)


class _NumPyOnly(pickle.Unpickler):
    """Objects in an .npy file, as long as they are made of NumPy arrays and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """A constructor of arrays; nothing else is ever called."""
        allowed = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
        if module.split(".")[0] == "numpy" and name in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file of arrays")


def _read_torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError(f"reading {path.name} needs torch: pip install torch") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # of old versions of pickle
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return _to_numpy(content)


def _to_numpy(value: Any) -> Any:
    """The same with arrays in place of tensors; types that NumPy lacks become float32."""
    if isinstance(value, Mapping):
        return {key: _to_numpy(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_to_numpy(x) for x in value]
    if hasattr(value, "numpy"):
        return (value.float() if value.is_floating_point() else value).numpy()
    return value


def _read_yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError(f"reading {path} needs pyyaml: pip install 'eplb-jax[cli]'") from None
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
