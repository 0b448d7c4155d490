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
    "step_time": ("step\ntime", "{:.3f}"),
    "plan_ms": ("plan,\nms", "{:.1f}"),
    "compile_s": ("comp.,\ns", "{:.1f}"),
}
"""Columns of the table: the key in `summary`, the header, and the format."""


def summary(
    result: Replay, num_replicas: int, none: Replay | None = None
) -> dict[str, float | None]:
    """Imbalance over layers and windows, moves per layer and plan, times; None without a plan.

    With a replay without a balancer: the time of steps in units of its.
    """
    planned, replanned = result.seconds.size > 0, result.moves.size > 0
    busy = result.imbalance[result.load > 0] if result.load.any() else np.zeros(1)
    return {
        "time_lost": result.time_lost,
        "imbalance_mean": result.mean_imbalance,
        "imbalance_p95": float(np.percentile(busy, 95)),
        "imbalance_worst": float(busy.max()),
        "moves_mean": float(result.moves.mean()) if replanned else None,
        "moves_share": float(result.moves.mean()) / num_replicas if replanned else None,
        "step_time": None if none is None else result.slowest.sum() / none.slowest.sum(),
        "plan_ms": float(np.median(result.seconds)) * 1e3 if planned else None,
        "compile_s": result.compile_seconds if planned else None,
    }


def table(
    results: Mapping[str, Replay],
    arguments: Mapping[str, Any],
    shape: Sequence[int],
    none: Replay | None = None,
) -> Table:
    """A row for every replay of a trace of that shape; `none` as in `summary`."""
    every, window = arguments["every"], arguments["window"]
    interval = "window" if every == 1 else f"{every} windows"
    measured = f"{shape[0] - window} window{'s' * (shape[0] - window > 1)}"
    memory = arguments["memory"]
    older = f" and {memory} group{'s' * (memory > 1)} of older ones" if memory else ""
    second = "time lost: its mean weighted by load"
    if none is not None:
        second = "loads are times; step time: of the slowest GPUs / without balancer"
    rows = Table(
        title=f"{shape[1]} layers x {shape[2]} experts, {measured}, "
        f"a plan every {interval} from the {window} before{older}",
        caption="imb.: imbalance, max / mean GPU load - 1, over layers and windows with load;\n"
        f"{second}; slots moved: from another GPU,\nof those of a layer, per plan; plan: the "
        "median time, without comp., the time of\ncompilation",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    rows.add_column("", no_wrap=True)
    columns = dict(COLUMNS)
    del columns["step_time" if none is None else "time_lost"]
    for header, _ in columns.values():
        rows.add_column(header, justify="right", vertical="bottom")
    for name, result in results.items():
        values = summary(result, arguments["num_replicas"], none)
        shown = ((form, values[key]) for key, (_, form) in columns.items())
        rows.add_row(name, *("" if x is None else form.format(x) for form, x in shown))
    return rows


def as_json(
    results: Mapping[str, Replay],
    arguments: Mapping[str, Any],
    shape: Sequence[int],
    measured: np.ndarray,
    none: Replay | None = None,
) -> str:
    """Numbers of the table, series by window and layer, versions and arguments, as JSON."""
    device = jax.devices()[0]
    rows = [
        {"name": name}
        | summary(result, arguments["num_replicas"], none)
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
