"""Measured loads: the bundled traces, and files of loads."""

import csv
import json
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Int64

EXAMPLES = ("deepseek_v3_0324", "deepseek_v2_lite", "gpt_oss_20b", "gpt_oss_20b_decode")
"""Names of the bundled traces."""


def example(name: str = "deepseek_v3_0324") -> Int64[np.ndarray, "T L E"]:
    """Measured tokens routed to every expert of a real model, in every window; MoE layers only.

    deepseek_v3_0324: DeepSeek-V3-0324, [2, 58, 256], 8 experts a token. MMLU text packed to 4k
    tokens, then to 8k. Bobchenyx/CC-MoE at commit 98b792d, MIT licence.

    deepseek_v2_lite: DeepSeek-V2-Lite after fine-tuning, [32, 26, 64], 6 experts a token. Four
    tasks in turn (intent, law, summary, translation), 8 windows of 1024 tokens each.
    deepseek-ai/ESFT at commit 579a771, MIT licence.

    gpt_oss_20b: gpt-oss-20b decoding, [26, 24, 32], 4 experts a token. Windows of 8192 generated
    tokens, one request after another. AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting at commit
    72b368f, Apache-2.0 licence.

    gpt_oss_20b_decode: the same tokens, [31, 24, 32], as if all 703 requests had been decoded in
    one batch. Windows of 16 steps, with fewer tokens as requests end. The same source and licence.

    Args:
        name: One of `EXAMPLES`.

    Returns:
        Counts of routed tokens; every layer of a window adds up to tokens times experts a token.

    Raises:
        ValueError: The name is not known.

    Example:
        >>> example().shape
        (2, 58, 256)
        >>> example("gpt_oss_20b").shape
        (26, 24, 32)
    """
    if name not in EXAMPLES:
        raise ValueError(f"name={name!r} is not known; choose one of: {', '.join(EXAMPLES)}")
    source = resources.files("eplb_jax.evaluation").joinpath("data", f"{name}.npz")
    with source.open("rb") as file, np.load(file) as data:
        return data["load"].astype(np.int64)


def read(path: str | Path) -> np.ndarray:
    """The loads in a file, [L, E] or [T, L, E].

    Args:
        path: A .npz file (the array named `load`, or its only array), a .npy file, a .json file
            (nested lists, or an object with them under `load`), or a .csv file of L lines
            with E numbers each.

    Returns:
        The array as stored.

    Raises:
        ValueError: The file cannot be read, or does not hold loads.

    Example:
        >>> read("load.csv").shape  # doctest: +SKIP
        (58, 256)
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".npy": _read_npy, ".json": _read_json, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file; use one of: {', '.join(readers)}")
    try:
        load = readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, csv.Error) as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file of loads: {error}") from error
    if load.dtype.kind not in "iuf" or load.ndim not in (2, 3) or load.size == 0:
        raise ValueError(
            f"{path}: expected numbers of the shape [layers, experts] or "
            f"[windows, layers, experts], got {load.dtype} of the shape {load.shape}"
        )
    return load


def _read_npz(path: Path) -> np.ndarray:
    with path.open("rb") as file, np.load(file) as data:
        if "load" not in data and len(data.files) != 1:
            raise ValueError(f"no array is named 'load' among {', '.join(data.files) or 'none'}")
        return data["load" if "load" in data else data.files[0]]


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        array = np.load(file)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays")
    return array


def _read_json(path: Path) -> np.ndarray:
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict):
        if "load" not in data:
            raise ValueError(f"no 'load' among {', '.join(data) or 'none'}")
        data = data["load"]
    return np.asarray(data)


def _read_csv(path: Path) -> np.ndarray:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[float(x) for x in row] for row in csv.reader(file) if row]
    return np.asarray(rows)
