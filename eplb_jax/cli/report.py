"""What a replay comes to: the table, and all numbers as JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import jax
import numpy as np
from rich import box
from rich.table import Table

from eplb_jax.evaluation.replay import Replay


def _percent(digits: int) -> Callable[[float], str]:
    return lambda x: f"{x * 100:.{digits}f}"


COLUMNS = {
    "imbalance_mean": ("imbalance\nmean, %", _percent(2)),
    "imbalance_p95": ("95th,\n%", _percent(1)),
    "imbalance_worst": ("worst,\n%", _percent(1)),
    "moves_mean": ("slots\nmoved", "{:.1f}".format),
    "moves_share": ("share,\n%", _percent(1)),
    "plan_ms": ("plan,\nms", "{:.1f}".format),
    "compile_s": ("compile\ns", "{:.1f}".format),
}
"""Of the table: the number, its header, and how it is shown."""


def summary(result: Replay, num_replicas: int) -> dict[str, float | None]:
    """Imbalance over layers and windows, moves a layer and replan, times; None where none is."""
    planned, replanned = result.seconds.size > 0, result.moves.size > 0
    return {
        "imbalance_mean": float(result.imbalance.mean()),
        "imbalance_p95": float(np.percentile(result.imbalance, 95)),
        "imbalance_worst": float(result.imbalance.max()),
        "moves_mean": float(result.moves.mean()) if replanned else None,
        "moves_share": float(result.moves.mean()) / num_replicas if replanned else None,
        "plan_ms": float(np.median(result.seconds)) * 1e3 if planned else None,
        "compile_s": result.compile_seconds if planned else None,
    }


def table(
    results: Mapping[str, Replay],
    shape: Sequence[int],
    num_replicas: int,
    window: int,
    every: int,
) -> Table:
    """A row for every replay."""
    num_windows, num_layers, num_experts = shape
    count = num_windows - window
    measured = "1 window" if count == 1 else f"{count} windows"
    each = "window" if every == 1 else f"{every} windows"
    made = Table(
        title=f"{num_layers} layers x {num_experts} experts, {measured}, "
        f"a plan every {each} from the {window} before",
        caption="imbalance: heaviest / mean GPU - 1 in the windows after a plan, over layers and\n"
        "windows; slots moved: from another GPU, a layer and replan; plan: the median",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    made.add_column("", no_wrap=True)
    for header, _ in COLUMNS.values():
        made.add_column(header, justify="right", vertical="bottom")
    for name, result in results.items():
        row = summary(result, num_replicas)
        values = ((row[key], show) for key, (_, show) in COLUMNS.items())
        cells = ("" if value is None else show(value) for value, show in values)
        made.add_row(name, *cells)
    return made


def report(
    results: Mapping[str, Replay],
    arguments: Mapping[str, object],
    num_replicas: int,
    shape: Sequence[int],
    measured: np.ndarray,
) -> str:
    """Numbers of the table, series by window and layer, versions and arguments, as JSON."""
    device = jax.devices()[0]
    rows = [
        {"name": name}
        | summary(result, num_replicas)
        | {
            "imbalance": result.imbalance.round(6).tolist(),
            "moves": result.moves.tolist(),
            "plan_seconds": result.seconds.round(6).tolist(),
        }
        for name, result in results.items()
    ]
    return json.dumps(
        {
            "versions": {name: version(name) for name in ("eplb-jax", "jax", "numpy")},
            "device": f"{device.platform} ({device.device_kind})",
            "arguments": dict(arguments),
            "shape": list(shape),
            "windows": measured.tolist(),
            "results": rows,
        }
    )
