"""The pictures of `speed.py`: imbalance against time, and time against size."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_speed(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ours = [(row["run_ms"], 100 * row["imbalance"]) for row in rows if not row["peer"]]
    for row in rows:
        point = row["run_ms"], 100 * row["imbalance"]
        axes.scatter(*point, s=50, zorder=3, color="#b9b9b9" if row["peer"] else "#1f77b4")
        beside = (6, -14) if row["peer"] else (6, 5)
        close = any(1 < x / point[0] < 2.2 and 0.7 < y / point[1] < 1.4 for x, y in ours)
        if close and not row["peer"]:  # the label of the next one stands there
            beside = (-6, 5)
        align = "right" if beside[0] < 0 else "left"
        axes.annotate(row["side"], point, xytext=beside, textcoords="offset points", ha=align)
    axes.set(
        xscale="log", yscale="log", xlabel="a whole plan, ms", title=f"a plan of {rows[0]['shape']}"
    )
    axes.set(ylabel="imbalance (max / mean GPU load - 1), %")
    finish(figure, path)


def draw_growth(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = [*dict.fromkeys(row["panel"] for row in rows)]
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        inside = [row for row in rows if row["panel"] == panel]
        for side in dict.fromkeys(row["side"] for row in inside):
            line = [(row["size"], row["run_ms"]) for row in inside if row["side"] == side]
            axes.plot(*zip(*line, strict=True), "o-", ms=4, label=side,
                      color="#b9b9b9" if side == "heap_lpt" else None)  # fmt: skip
        sizes = sorted({row["size"] for row in inside})
        top = max(row["run_ms"] for row in inside)
        ends = sizes[0], sizes[-1]
        axes.plot(ends, (top * ends[0] / ends[1], top), "k:", lw=1, label="slope 1")
        axes.set(xscale="log", yscale="log", xlabel=panel)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xticks([], minor=True)
    figure.axes[0].set_ylabel("a whole plan, ms")
    figure.axes[0].legend(frameon=False)
    finish(figure, path)


def finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3, which="major")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.2)
    figure.savefig(path, dpi=150)
