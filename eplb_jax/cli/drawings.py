"""Pictures of a report, as SVG inside HTML whose colors are those of the page, light or dark."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from eplb_jax.evaluation.diagnosis import (
    DEEPSEEK,
    KEPT,
    LAST_WINDOW,
    MEMORY,
    NO_BALANCER,
    Spares,
)
from eplb_jax.evaluation.replay import Replay
from eplb_jax.types import Topology

_TEXT, _RULE, _SHADE = "#010101", "#020202", "#030303"
LINES = {
    NO_BALANCER: (1, (6, 2, 1, 2)),
    KEPT: (2, (7, 2)),
    MEMORY: (3, ()),
    LAST_WINDOW: (4, (3.5, 1.5)),
    DEEPSEEK: (5, (1, 1.2)),
}
"""Of every line the number of its color, `--line-1` to `--line-5` in the page, and its dashes."""

_VARIABLES = {_TEXT: "currentColor", _RULE: "var(--rule)", _SHADE: "var(--shade)"}
_VARIABLES |= {f"#0a000{i}": f"var(--line-{i})" for i, _ in LINES.values()}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "text.color": _TEXT,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_MAX_POINTS = 80
_MIN_RANGE, _MAX_RANGE = 0.05, 1.0  # half ranges of the color scale, the first also its step


def heat_maps(
    before: np.ndarray, after: np.ndarray, topology: Topology, layers: Sequence[int]
) -> tuple[str, str]:
    """Loads of layers and GPUs, [L, G] relative to the mean GPU, in one color scale."""
    largest = max(float(np.abs(x - 1).max()) for x in (before, after))
    half = min(np.ceil(largest / _MIN_RANGE) * _MIN_RANGE or _MIN_RANGE, _MAX_RANGE)
    beyond = "max" if largest > half else "neither"
    norm = Normalize(1 - half, 1 + half)
    return _heat_map("now", before, norm, beyond, topology, layers), _heat_map(
        "with the new plan", after, norm, beyond, topology, layers
    )


def _heat_map(
    name: str,
    loads: np.ndarray,
    norm: Normalize,
    beyond: str,
    topology: Topology,
    layers: Sequence[int],
) -> str:
    num_layers = len(loads)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4, min(1.6 + 0.06 * num_layers, 6)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(loads, "RdBu_r", norm, aspect="auto", interpolation="none")
        axes.set(xlabel="GPU", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda y, _: str(layers[int(y)]) if 0 <= y < num_layers else "")
        )
        first_gpus = np.flatnonzero(np.diff(topology.node_of_gpu)) + 0.5
        axes.vlines(first_gpus, -0.5, num_layers - 0.5, color="#808080", linewidth=0.8)
        bar = figure.colorbar(
            ScalarMappable(norm, "RdBu_r"),
            ax=axes,
            orientation="horizontal",
            extend=beyond,
            aspect=30,
            label="load of the GPU, relative to the mean",
        )
        half = norm.vmax - 1 if norm.vmax is not None else 1.0
        bar.set_ticks([1 - half, 1 - half / 2, 1, 1 + half / 2, 1 + half])
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _signed(x - 1)))
        bar.outline.set_visible(False)
        worst = float(loads.max() - 1)
        text = (
            f"Heat map of the load of {loads.shape[1]} GPUs in {num_layers} layers, {name}; "
            f"the most loaded GPU of any layer has {worst:.0%} more than the mean. "
            "The table below lists the worst layers."
        )
        return _to_svg(figure, text)


def _signed(value: float) -> str:
    return (
        "mean"
        if abs(value) < 1e-9
        else f"{100 * value:+.3g}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")
    )


def windows_of_point(count: int) -> int:
    """How many windows a point of `lines` is the mean of."""
    return -(-count // _MAX_POINTS)


def lines(replays: Mapping[str, Replay], window: int, seen: int, end: int) -> str:
    """The mean imbalance of every replay by window; windows from `seen` on are shaded."""
    first = np.arange(0, end - window, windows_of_point(end - window))
    count = np.diff(first, append=end - window)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(seen - 0.5, end - 0.5, color=_SHADE, linewidth=0)
        highest = 0.0
        for name, result in replays.items():
            number, dashes = LINES[name]
            heights = np.add.reduceat(result.imbalance.mean(axis=1), first) / count
            highest = max(highest, heights.max())
            line = {"color": f"#0a000{number}", "linestyle": (0, dashes or None)}
            line |= {"linewidth": 2.6 if name == MEMORY else 1.7}
            line |= {"marker": "o" if len(heights) == 1 else ""}
            axes.plot(window + first + (count - 1) / 2, heights, **line)
        axes.set_xlim(window - 0.5, end - 0.5)
        _percent_axis(axes, "imbalance, mean over layers", highest)
        axes.set_xlabel("window")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        text = (
            f"Imbalance by window, {window} to {end - 1}, one line for every way to plan. "
            "The table below has the means."
        )
        return _to_svg(figure, text)


def steps(spares: Sequence[Spares], now: int) -> str:
    """Imbalance against slots, with the number of today marked."""
    slots = [x.slots_per_gpu for x in spares]
    heights = [x.imbalance for x in spares]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4, 2.5), layout="constrained")
        axes = figure.subplots()
        color = "#0a0003"
        axes.plot(slots, heights, color=color, linewidth=2, marker="o", markersize=5)
        axes.axvline(now, color=_RULE, linewidth=1.2, linestyle=(0, (3, 3)), zorder=0)
        axes.annotate(" now", (now, 1), xycoords=("data", "axes fraction"), verticalalignment="top")
        axes.set_xticks(slots)
        axes.set_xlabel("slots on every GPU")
        _percent_axis(axes, "imbalance", max(heights))
        axes.margins(x=0.08)
        text = "Imbalance against the number of slots on every GPU; the table has the numbers."
        return _to_svg(figure, text)


def _percent_axis(axes: Axes, label: str, highest: float) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.08 * highest or 1)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.3g}\N{NO-BREAK SPACE}%"))
    axes.grid(axis="y", linewidth=0.6)


def _to_svg(figure: Figure, text: str) -> str:
    """The `svg` element, with the alternative text, for a page that defines the colors."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": text}):  # ids differ between pictures
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    (box,) = re.findall(r'viewBox="([^"]+)"', svg)
    body = svg[svg.index("<defs>") :]
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[^"]*_\d+"', "", body)  # of groups, the same in every picture
    body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(text)}">{body}'
