"""The results of replays: the table, and all numbers as JSON."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from eplb_jax.evaluation.replay import Replay

COLUMNS = {
    "time_lost": ("time\nlost", "{:.2%}"),
    "imbalance_mean": ("mean\nimb.", "{:.2%}"),
    "imbalance_p95": ("p95", "{:.1%}"),
    "imbalance_worst": ("worst", "{:.1%}"),
    "moves_share": ("slots\nmoved", "{:.1%}"),
    "plan_ms": ("plan,\nms", "{:.1f}"),
    "compile_s": ("comp.,\ns", "{:.1f}"),
}
"""Columns of the table: the key in `summary`, the header, and the format."""


def summary(result: Replay, num_replicas: int) -> dict[str, float | None]:
    """Imbalance over layers and windows, moves per layer and plan, times; None without a plan."""
    planned, replanned = result.seconds.size > 0, result.moves.size > 0
    busy = result.imbalance[result.load > 0] if result.load.any() else np.zeros(1)
    return {
        "time_lost": result.time_lost,
        "imbalance_mean": result.mean_imbalance,
        "imbalance_p95": float(np.percentile(busy, 95)),
        "imbalance_worst": float(busy.max()),
        "moves_mean": float(result.moves.mean()) if replanned else None,
        "moves_share": float(result.moves.mean()) / num_replicas if replanned else None,
        "plan_ms": float(np.median(result.seconds)) * 1e3 if planned else None,
        "compile_s": result.compile_seconds if planned else None,
    }


def table(
    results: Mapping[str, Replay], arguments: Mapping[str, Any], shape: Sequence[int]
) -> Table:
    """A row for every replay of a trace of that shape."""
    every, window = arguments["every"], arguments["window"]
    interval = "window" if every == 1 else f"{every} windows"
    measured = f"{shape[0] - window} window{'s' * (shape[0] - window > 1)}"
    memory = arguments["memory"]
    older = f" and {memory} group{'s' * (memory > 1)} of older ones" if memory else ""
    rows = Table(
        title=f"{shape[1]} layers x {shape[2]} experts, {measured}, "
        f"a plan every {interval} from the {window} before{older}",
        caption="imb.: imbalance, max / mean GPU load - 1, over layers and windows with load;\n"
        "time lost: its mean weighted by load; slots moved: from another GPU, of those of a\n"
        "layer, per plan; plan: the median time, without comp., the time of compilation",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    rows.add_column("", no_wrap=True)
    for header, _ in COLUMNS.values():
        rows.add_column(header, justify="right", vertical="bottom")
    for name, result in results.items():
        values = summary(result, arguments["num_replicas"])
        shown = ((form, values[key]) for key, (_, form) in COLUMNS.items())
        rows.add_row(name, *("" if x is None else form.format(x) for form, x in shown))
    return rows


def as_json(
    results: Mapping[str, Replay],
    arguments: Mapping[str, Any],
    shape: Sequence[int],
    measured: np.ndarray,
) -> str:
    """Numbers of the table, series by window and layer, versions and arguments, as JSON."""
    device = jax.devices()[0]
    rows = [
        {"name": name}
        | summary(result, arguments["num_replicas"])
        | {
            "imbalance": result.imbalance.round(6).tolist(),
            "moves": result.moves.tolist(),
            "plan_seconds": result.seconds.round(6).tolist(),
        }
        for name, result in results.items()
    ]
    content = {
        "versions": {name: version(name) for name in ("eplb-jax", "jax", "numpy")},
        "device": f"{device.platform} ({device.device_kind})",
        "arguments": dict(arguments),
        "shape": list(shape),
        "windows": measured.tolist(),
        "results": rows,
    }
    return json.dumps(content)
