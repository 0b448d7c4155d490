"""Plain arrays and tables of loads: .npz, .npy, JSON lists, CSV."""

import numpy as np

from eplb_jax.formats.sources import Source
from eplb_jax.formats.types import LAST_IS_SEEN, Format, Recording, numbered

_COLUMNS = {
    "window": ("window", "step", "iteration", "iter", "time"),
    "layer": ("layer", "layer_id", "layer_idx", "layer_index"),
    "expert": ("expert", "expert_id", "expert_idx", "expert_index"),
    "count": ("count", "counts", "load", "tokens", "num_tokens", "value"),
}
"""What the columns of triples are called, in lower case."""


def _is_array(source: Source) -> bool:
    if source.kind == "npz":
        return "load" in source.content or len(source.content) == 1
    if source.kind == "json":
        return isinstance(source.content, list) or "load" in source.keys
    return source.kind in ("npy", "torch") and isinstance(source.content, np.ndarray)


def _read_array(source: Source) -> Recording:
    content, layers, phases = source.content, None, ()
    if source.kind == "npz":
        layers, phases = content.get("layers"), tuple(map(str, content.get("phases", ())))
        if "load" not in content and len(content) != 1:
            raise ValueError(f"no array is named 'load' among {', '.join(content)}")
        content = content["load"] if "load" in content else next(iter(content.values()))
    elif isinstance(content, dict):
        content = content["load"]
    load = np.asarray(content)
    if layers is None:
        layers = numbered(load.shape[-2] if load.ndim > 1 else 0)
    return Recording(load, tuple(int(x) for x in layers), phases)


def _is_triples(source: Source) -> bool:
    return source.kind == "table" and _columns(source.content) is not None


def _columns(cells: list[list[str]]) -> dict[str, int] | None:
    """The place of every column of triples; None if the table is not of triples.

    Without a header, three columns are triples when no pair of layer and expert is repeated and
    there are more experts than the one column of a table [layers, 3 experts] could tell apart.
    """
    first = [cell.lower() for cell in cells[0]]
    if not all(_is_number(cell) for cell in first):
        found = {k: i for k, names in _COLUMNS.items() for i, x in enumerate(first) if x in names}
        return found if {"layer", "expert", "count"} <= set(found) else None
    names = {3: ("layer", "expert", "count"), 4: ("window", "layer", "expert", "count")}
    if len(first) not in names or not all(x.isdecimal() for row in cells for x in row[:-1]):
        return None
    keys = [tuple(row[:-1]) for row in cells]
    experts = {row[-2] for row in cells}
    if len(set(keys)) < len(keys) or len(experts) <= len(first):
        return None
    return {name: i for i, name in enumerate(names[len(first)])}


def _read_triples(source: Source) -> Recording:
    places = _columns(source.content)
    if places is None:
        raise ValueError("expected the columns layer,expert,count, or window,layer,expert,count")
    body = source.content[0 if _is_number(source.content[0][places["layer"]]) else 1 :]
    column = {name: np.array([float(row[i]) for row in body]) for name, i in places.items()}
    for name, values in column.items():
        bad = np.flatnonzero(values != np.floor(values)) if name != "count" else []
        if len(bad):
            raise ValueError(f"{name} {values[bad[0]]} in line {bad[0] + 1} is not an integer")
    windows = np.unique(column.get("window", np.zeros(1)), return_inverse=True)
    layers = np.unique(column["layer"], return_inverse=True)
    window = windows[1] if "window" in column else np.zeros(len(body), int)
    expert = column["expert"].astype(int)
    if expert.min() < 0:
        raise ValueError(f"expert {expert.min()}; experts are numbered from 0")
    load = np.full((len(windows[0]), len(layers[0]), expert.max() + 1), np.nan)
    np.add.at(seen := np.zeros(load.shape, int), (window, layers[1], expert), 1)
    if seen.max() > 1:
        where = np.unravel_index(seen.argmax(), seen.shape)
        raise ValueError(f"layer {layers[0][where[1]]:g}, expert {where[2]} has several lines")
    load[window, layers[1], expert] = column["count"]
    absent = int(np.isnan(load).sum())
    notes = (f"{absent} of {load.size} counts are not in the file and taken as 0",) * bool(absent)
    if absent:
        notes += (LAST_IS_SEEN.format(load.shape[2] - 1),)
    load = np.nan_to_num(load, nan=0.0) if absent else load
    whole = load.astype(np.int64) if np.all(load == np.floor(load)) else load
    return Recording(whole, tuple(int(x) for x in layers[0]), notes=notes)


def _is_table(source: Source) -> bool:
    return source.kind == "table" and not _is_triples(source)


def _read_table(source: Source) -> Recording:
    """A line for every layer; columns named `window` and `layer` may come first."""
    header = source.content[0]
    named = not all(_is_number(cell) for cell in header)
    names = [cell.lower() for cell in header] if named else []
    place = {x: [i for i, name in enumerate(names) if name in _COLUMNS[x]] for x in _COLUMNS}
    keys = [i for x in ("window", "layer") for i in place[x][:1]]
    if named and not place["layer"] and len(source.content) == 1:
        raise ValueError(f"expected a line of counts for every layer, got only {header}")
    body = source.content[named:]
    values = np.array([[float(cell) for cell in row] for row in body])
    load = np.delete(values, keys, axis=1)
    load = load.astype(np.int64) if np.all(load == np.floor(load)) else load
    layer = values[:, place["layer"][0]].astype(int) if place["layer"] else np.arange(len(values))
    if not place["window"]:
        return Recording(load[None], tuple(layer.tolist()))
    windows, window = np.unique(values[:, place["window"][0]], return_inverse=True)
    if not place["layer"]:
        layer = np.concatenate([np.arange(n) for n in np.bincount(window)])
    layers, row = np.unique(layer, return_inverse=True)
    if len(values) != len(windows) * len(layers):
        raise ValueError(
            f"{len(values)} lines for {len(windows)} windows of {len(layers)} layers; "
            "every window needs a line for every layer"
        )
    shaped = np.zeros((len(windows), len(layers), load.shape[1]), load.dtype)
    shaped[window, row] = load
    return Recording(shaped, tuple(layers.tolist()))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


FORMATS = (
    Format(
        "array",
        "an .npz array named load, an .npy or .pt array, or nested JSON lists",
        _is_array,
        _read_array,
    ),
    Format(
        "triples", "CSV, columns layer,expert,count and maybe window", _is_triples, _read_triples
    ),
    Format("table", "CSV, one line of E counts for every layer", _is_table, _read_table),
)
