"""The picture of a simulation: imbalance over time, and the GPU loads of one layer."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eplb_jax.evaluation.replay import Replay

_LINES = ("#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
_LEGEND = {"loc": "outside upper left", "ncols": 5, "frameon": False}
_COLORS = "RdBu_r"
_LEAST_REACH = 0.05


def picture(
    results: Mapping[str, Replay], shown: tuple[str, str], without: str, window: int, time: str
) -> Figure:
    """Mean imbalance of all results against time, and heat maps of the two that are `shown`.

    Those are of the layer that is worst in the result `without`, in the mean over windows.
    """
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1), hspace=0.06)
        lines = figure.add_subplot(grid[0, :])
        _draw_lines(lines, results, shown[1], without, window, time)
        figure.legend(*lines.get_legend_handles_labels(), **_LEGEND)
        layer = int(np.argmax(results[without].imbalance.mean(axis=0)))
        maps = [results[name].gpu_load[:, layer] for name in shown]
        # Symmetric about 1, so that the mean GPU is white.
        reach = max(_LEAST_REACH, *(float(np.abs(x - 1).max()) for x in maps))
        norm = Normalize(1 - reach, 1 + reach)
        left = figure.add_subplot(grid[1, 0])
        both = left, figure.add_subplot(grid[1, 1], sharey=left)
        for axes, name, loads in zip(both, shown, maps, strict=True):
            axes.set_title(name, fontsize=10, loc="left")
            axes.set_xlabel(time)
            _draw_loads(axes, loads, norm, window)
        left.set_ylabel(f"GPU of layer {layer},\nthe worst without a balancer")
        both[1].tick_params(labelleft=False)
        bar = figure.colorbar(
            ScalarMappable(norm, _COLORS), ax=both, label="GPU load / mean GPU", pad=0.02
        )
        bar.ax.set_ylim(max(0.0, 1 - reach), 1 + reach)
    return figure


def _draw_lines(
    axes: Axes, results: Mapping[str, Replay], other: str, without: str, window: int, time: str
) -> None:
    axes.set_prop_cycle(color=_LINES)
    styles = {other: {"color": "#d62728"}, without: {"color": "#8f8f8f", "linestyle": "--"}}
    for name, result in results.items():
        heights = result.imbalance.mean(axis=1)
        (line,) = axes.plot(window + np.arange(heights.size), heights, label=name, linewidth=1.8)
        if heights.size == 1:
            line.set_marker("o")
        line.set(**styles.get(name, {}))
    axes.set_xlabel(time)
    axes.set_ylabel("imbalance, mean over layers")
    axes.set_title("Heaviest / mean GPU - 1 in the windows after a plan", fontsize=10, loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    highest = max(result.imbalance.mean(axis=1).max() for result in results.values())
    axes.set_xlim(window - 0.5, window + len(results[without].imbalance) - 0.5)
    axes.set_ylim(0, 1.06 * highest or 1)
    axes.grid(axis="y", alpha=0.25)


def _draw_loads(axes: Axes, loads: np.ndarray, norm: Normalize, window: int) -> None:
    num_windows, num_gpus = loads.shape
    axes.imshow(
        loads.T,
        aspect="auto",
        interpolation="nearest",
        cmap=_COLORS,
        norm=norm,
        extent=(window - 0.5, window + num_windows - 0.5, num_gpus - 0.5, -0.5),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
