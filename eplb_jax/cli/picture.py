"""Pictures of a plan and of a simulation."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eplb_jax.evaluation.metrics import Balance
from eplb_jax.evaluation.replay import Replay

_LINES = ("#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
_COLORS = "RdBu_r"
_MIN_RANGE = 0.05  # minimum half range of the color scale


def picture_of_plan(before: Balance, after: Balance) -> Figure:
    """GPU loads of the layer that is worst without a balancer, and max loads of all layers.

    Relative to the mean GPU of a layer; mean over windows.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    ratios = [_relative(np.asarray(x.gpu_load)) for x in (before, after)]
    layer = int(np.argmax(ratios[0].max(axis=2).mean(axis=0)))
    one, every = figure.subplots(2, 1)
    one.set(title=f"GPUs of layer {layer}, the worst without a balancer", xlabel="GPU")
    every.set(title="Most loaded GPU of every layer", xlabel="layer")
    for axes in (one, every):
        axes.set_ylabel("GPU load / mean GPU")
        axes.axhline(1, color="black", linewidth=0.8, zorder=3)
        axes.margins(x=0.01)
    bars = (-0.2, "no balancer", "#b9b9b9"), (0.2, "plan", "#1f77b4")
    for (shift, label, color), ratio in zip(bars, ratios, strict=True):
        for axes, heights in ((one, ratio[:, layer]), (every, ratio.max(axis=2))):
            place = np.arange(heights.shape[1]) + shift
            axes.bar(place, heights.mean(axis=0), 0.4, color=color, label=label)
    one.legend(frameon=False, loc="upper right")
    return _without_frames(figure)


def _relative(gpu_load: np.ndarray) -> np.ndarray:
    """Loads / mean GPU, [T, L, G]; zeros for a layer without load."""
    gpu_load = gpu_load.reshape(-1, *gpu_load.shape[-2:])
    mean = gpu_load.mean(axis=2, keepdims=True)
    return gpu_load / np.where(mean > 0, mean, 1)


def picture_of_replays(
    results: Mapping[str, Replay], shown: tuple[str, str], without: str, window: int, time: str
) -> Figure:
    """Mean imbalance of all results against time, and heat maps of the two that are `shown`.

    The heat maps are of the layer that is worst in the result `without`, mean over windows.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1), hspace=0.06)
    lines = figure.add_subplot(grid[0, :])
    _draw_lines(lines, results, shown[1], without, window, time)
    figure.legend(loc="outside upper left", ncols=5, frameon=False)
    layer = int(np.argmax(results[without].imbalance.mean(axis=0)))
    maps = [results[name].gpu_load[:, layer] for name in shown]
    # Symmetric about 1, so that the mean GPU is white.
    half = max(_MIN_RANGE, *(float(np.abs(x - 1).max()) for x in maps))
    norm = Normalize(1 - half, 1 + half)
    left = figure.add_subplot(grid[1, 0])
    both = left, figure.add_subplot(grid[1, 1], sharey=left)
    for axes, name, loads in zip(both, shown, maps, strict=True):
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel(time)
        num_windows, num_gpus = loads.shape
        box = (window - 0.5, window + num_windows - 0.5, num_gpus - 0.5, -0.5)
        axes.imshow(loads.T, _COLORS, norm, extent=box, aspect="auto", interpolation="nearest")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left.set_ylabel(f"GPU of layer {layer},\nthe worst without a balancer")
    both[1].tick_params(labelleft=False)
    colors = ScalarMappable(norm, _COLORS)
    bar = figure.colorbar(colors, ax=both, label="GPU load / mean GPU", pad=0.02)
    bar.ax.set_ylim(max(0.0, 1 - half), 1 + half)
    return _without_frames(figure)


def _without_frames(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_lines(
    axes: Axes, results: Mapping[str, Replay], other: str, without: str, window: int, time: str
) -> None:
    axes.set_prop_cycle(color=_LINES)
    styles = {other: {"color": "#d62728"}, without: {"color": "#8f8f8f", "linestyle": "--"}}
    means = {name: result.imbalance.mean(axis=1) for name, result in results.items()}
    for name, heights in means.items():
        marker = "o" if heights.size == 1 else ""
        (line,) = axes.plot(window + np.arange(heights.size), heights, marker, label=name)
        line.set(linewidth=1.8, **styles.get(name, {}))
    axes.set_title("Max / mean GPU load - 1 in the windows after a plan", fontsize=10, loc="left")
    axes.set(ylabel="imbalance, mean over layers", xlabel=time)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(window - 0.5, window + len(means[without]) - 0.5)
    axes.set_ylim(0, 1.06 * max(x.max() for x in means.values()) or 1)
    axes.grid(axis="y", alpha=0.25)
