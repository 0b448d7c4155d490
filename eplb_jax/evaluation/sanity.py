"""Loads that look like a fault of their recording.

Thresholds are set on measured traces: those of `loads.EXAMPLES`, DeepSeek-R1 (3 x 58 x 256) and
OLMoE (6 x 3 x 64). None of them has a finding.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from eplb_jax.checks import LoadLike, as_count, as_experts, as_load
from eplb_jax.types import Placement, Topology, as_topology, check_experts

Kind = Literal[
    "no load",
    "one layer",
    "one GPU",
    "equal counts",
    "layer totals",
    "cumulative",
    "identical windows",
    "small windows",
    "unused experts",
]

NEARLY_ALL = 0.99
"""Share of a window that is called all of it, if it is in one layer or on one GPU. With experts in
order, one of two GPUs has at most 0.59 of the load of all layers in measured traces, one of four
0.33."""

EQUAL = 0.01
"""Max / min count of a layer - 1, up to which its counts are called equal. At least 2.8 in measured
traces."""

TOTALS = 0.01
"""Relative difference of a layer from the median layer of its window. Zero in measured traces, as
every token visits all layers; one pass of a hundred that some layers do not count makes 0.01."""

LEAST_CUMULATIVE = 4
"""Number of windows after which counts that never decrease are called cumulative, each window with
more load than the one before. Traffic that grows is not meant: in measured windows resized so that
each is 1.5 to 16 times the one before, some counts decrease in all 83 sets of four windows, but in
2 of 88 sets of three, with 4 times, none does."""

SMALL = 100
"""How many times smaller than the median window is called small. At most 1.3 in measured traces."""

CHANCE = 1e-4
"""Expected number of GPUs that would have all of a window by chance, or of experts without load in
all layers, up to which these are reported. Windows of a few tokens have both, and layers of
measured traces have up to 7 experts of 32 without load in a window, but others in every layer."""

_NAMED = 5
"""Number of windows or layers that a message names."""


class Finding(NamedTuple):
    """Something that looks like a fault of the recording.

    Attributes:
        kind: One of `Kind`.
        message: What was found, with the numbers, and what may be the cause.
        windows: The windows concerned.
        layers: The numbers of the layers concerned; empty where it is all of them.
    """

    kind: Kind
    message: str
    windows: tuple[int, ...]
    layers: tuple[int, ...] = ()


class _Loads(NamedTuple):
    """Loads, their sums, the windows that no finding explains yet, and the numbers of layers."""

    load: Float[np.ndarray, "T L E"]
    layer: Float[np.ndarray, "T L"]
    window: Float[np.ndarray, " T"]
    left: Bool[np.ndarray, " T"]
    numbers: Int[np.ndarray, " L"]

    def without(self, *findings: Finding | None) -> "_Loads":
        """The same, with the windows of these findings explained."""
        left = self.left.copy()
        for finding in findings:
            left[list(finding.windows if finding else ())] = False
        return self._replace(left=left)


def inspect_loads(
    load: LoadLike,
    topology: Topology | int | None = None,
    placement: Placement | LoadLike | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> tuple[Finding, ...]:
    """What looks like a fault of the recording of loads; empty if nothing does.

    Windows and layers without load are legitimate, as of idle services and dense layers. A window
    is not judged further once it is found to be of one layer or GPU, or of equal counts. Runs on
    the host and cannot be traced.

    Args:
        load: Tokens routed to every expert: [T, L, E], or [L, E] or [E] for one window.
        topology: The GPUs that recorded them, or their number. None: any number that divides E.
        placement: The plan in place at that time, or its phy2log. None: experts in the order of
            slots, again from the first one.
        layers: The number of every layer, for findings. None: from 0.

    Returns:
        At most one finding of every kind.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: A load is NaN, infinite or negative, load, plan and topology do not fit, or a
            plan is given without a topology.

    Example:
        >>> load = np.zeros((4, 8))
        >>> load[:, 2:4] = [[40, 8], [16, 32], [30, 18], [20, 28]]
        >>> [finding] = inspect_loads(load, topology=4)
        >>> print(finding.kind, "-", finding.message)
        one GPU - 100.0 % of window 0 is on the experts of GPU 1 of 4, in all layers; perhaps the
        counts of GPUs were not added up
    """
    as_load(load, "load")
    counts = np.asarray(load, np.float64)
    counts = counts.reshape(len(counts) if counts.ndim == 3 else 1, -1, counts.shape[-1])
    layer = counts.sum(axis=2)
    numbers = np.arange(counts.shape[1]) if layers is None else np.asarray(layers)
    loads = _Loads(counts, layer, layer.sum(axis=1), layer.any(axis=1), numbers)
    held = _experts_of_gpus(counts.shape[1:], topology, placement)
    if not loads.left.any():
        every = tuple(range(len(counts)))
        return (Finding("no load", f"all {counts.size:,} loads are zero", every),)

    one_layer = _one_layer(loads)
    one_gpu = _one_gpu(loads.without(one_layer), held)
    equal = _equal_counts(loads.without(one_layer, one_gpu))
    rest = loads.without(one_layer, one_gpu, equal)
    found = [one_layer, one_gpu, equal, _layer_totals(rest), _cumulative(rest)]
    if found[-1] is None:  # cumulative windows start small, and repeat where there were no tokens
        found += [_identical_windows(rest), _small_windows(rest)]
    found.append(_unused_experts(rest))
    return tuple(x for x in found if x is not None)


def _experts_of_gpus(
    shape: tuple[int, ...], topology: Topology | int | None, placement: Any
) -> list[Bool[np.ndarray, "#L _ E"]]:
    """Whether a GPU has an expert, for every number of GPUs in question."""
    num_layers, num_experts = shape
    expert = np.arange(num_experts)
    if topology is None:
        if placement is not None:
            raise ValueError("placement needs a topology, got None; give it or the number of GPUs")
        numbers = [g for g in range(2, num_experts + 1) if num_experts % g == 0]
        return [(expert * g // num_experts == np.arange(g)[:, None])[None] for g in numbers]
    if placement is None:
        if not isinstance(topology, Topology):
            gpu = np.arange(as_count("topology", topology))[:, None]
            return [(expert * len(gpu) // num_experts == gpu)[None]]
        check_experts(topology, num_experts)
        slots = np.arange(topology.num_replicas)[None] % num_experts
    else:
        slots = np.asarray(as_experts(placement, "placement", num_experts=num_experts))
        if slots.size // slots.shape[-1] != num_layers:
            raise ValueError(
                f"placement has the shape {slots.shape}, but load has {num_layers} layers"
            )
        slots = slots.reshape(num_layers, -1)
    gpu_of_slot = as_topology(topology, slots.shape[1]).gpu_of_slot
    held = np.zeros((len(slots), gpu_of_slot.max() + 1, num_experts + 1), bool)  # the last for -1
    held[np.arange(len(slots))[:, None], gpu_of_slot, slots] = True
    return [held[..., :-1]]


def _one_layer(loads: _Loads) -> Finding | None:
    share, layer = _largest(loads.layer, loads)
    windows = np.flatnonzero(share >= NEARLY_ALL)
    count = loads.layer.shape[1]
    if not windows.size or count == 1:
        return None
    layers = np.unique(loads.numbers[layer[windows]])
    message = (
        f"{100 * share[windows].min():.1f} % of {_named('window', windows)} is in "
        f"{_named('layer', layers)} of {count}; perhaps all layers were counted as one"
    )
    return _finding("one layer", message, windows, layers)


def _one_gpu(loads: _Loads, held: list[Bool[np.ndarray, "#L _ E"]]) -> Finding | None:
    best = None
    for has in held:
        load = loads.load if len(has) > 1 else loads.load.sum(axis=1, keepdims=True)
        some = ~has.all(axis=(0, 2))  # a GPU with all experts always has all of the load
        on_gpu = np.einsum("tle,lge->tg", load, has.astype(np.float64), optimize=True) * some
        share, gpu = _largest(on_gpu, loads)
        by_chance = float(has.shape[1]) ** (1 - np.count_nonzero(loads.load, axis=(1, 2)))
        windows = np.flatnonzero((share >= NEARLY_ALL) & (by_chance <= CHANCE))
        if not windows.size or (best is not None and windows.size < len(best.windows)):
            continue
        message = (
            f"{100 * share[windows].min():.1f} % of {_named('window', windows)} is on the experts "
            f"of {_named('GPU', np.unique(gpu[windows]))} of {has.shape[1]}, in all layers; "
            "perhaps the counts of GPUs were not added up"
        )
        best = _finding("one GPU", message, windows)
    return best


def _equal_counts(loads: _Loads) -> Finding | None:
    most, least = loads.load.max(axis=2), loads.load.min(axis=2)
    windows = np.flatnonzero(loads.left & (most <= (1 + EQUAL) * least).all(axis=1))
    if not windows.size or loads.load.shape[2] == 1:
        return None
    first = windows[0], loads.layer[windows[0]].argmax()
    message = (
        f"the experts of every layer have equal counts in {_named('window', windows)}, "
        f"{least[first]:,.6g} to {most[first]:,.6g}; perhaps they are a placeholder, or the router "
        "is not the model's"
    )
    return _finding("equal counts", message, windows)


def _layer_totals(loads: _Loads) -> Finding | None:
    used = loads.layer.any(axis=0)  # dense layers have no load in any window
    typical = [np.median(x[x > 0]) if x.any() else 1 for x in loads.layer]
    relative = loads.layer / np.array(typical)[:, None]
    off = loads.left[:, None] & used & (np.abs(relative - 1) > TOTALS)
    windows, layers = np.flatnonzero(off.any(axis=1)), loads.numbers[off.any(axis=0)]
    if not windows.size:
        return None
    worst = np.unravel_index(np.where(off, np.abs(relative - 1), 0).argmax(), off.shape)
    message = (
        f"layers of a window have different totals, in {_named('window', windows)} and "
        f"{_named('layer', layers)}: layer {loads.numbers[worst[1]]} of window {worst[0]} has "
        f"{loads.layer[worst]:,.6g}, the median layer {typical[worst[0]]:,.6g}; perhaps passes are "
        "missing in some layers, or tokens were dropped"
    )
    return _finding("layer totals", message, windows, layers)


def _cumulative(loads: _Loads) -> Finding | None:
    grows = np.diff(loads.window) > 0
    if grows.sum() < LEAST_CUMULATIVE - 1 or (np.diff(loads.load, axis=0) < 0).any():
        return None
    message = (
        f"no count ever decreases in {len(loads.load)} windows, which grow from "
        f"{loads.window[0]:,.6g} to {loads.window[-1]:,.6g}; perhaps they are cumulative, and "
        "their differences are the loads"
    )
    return _finding("cumulative", message, np.arange(len(loads.load)))


def _identical_windows(loads: _Loads) -> Finding | None:
    same = (loads.load[1:] == loads.load[:-1]).all(axis=(1, 2))
    windows = 1 + np.flatnonzero(same & loads.left[1:])
    if not windows.size:
        return None
    message = (
        f"every count of {_named('window', windows)} is that of the window before; perhaps one "
        "recording was read twice"
    )
    return _finding("identical windows", message, windows)


def _small_windows(loads: _Loads) -> Finding | None:
    typical = np.median(loads.window[loads.window > 0])
    small = loads.left & (loads.window * SMALL <= typical)
    windows = np.flatnonzero(small)
    if not windows.size:
        return None
    message = (
        f"{_named('window', windows)} of {len(small)}: a load of {loads.window[small].min():,.6g}, "
        f"the median is {typical:,.6g}; perhaps units differ, or recording had only begun"
    )
    return _finding("small windows", message, windows)


def _unused_experts(loads: _Loads) -> Finding | None:
    load = loads.load[loads.left].sum(axis=0)
    unused = load[load.any(axis=1)] == 0
    experts = np.flatnonzero(unused.all(axis=0))
    by_chance = unused.shape[1] * unused.mean(axis=1).prod()
    if not experts.size or by_chance > CHANCE:
        return None
    message = (
        f"no load in any layer and window: {_named('expert', experts)} of {unused.shape[1]}; "
        "perhaps the counts of a GPU are missing, or the experts are padding"
    )
    return _finding("unused experts", message, np.flatnonzero(loads.left))


def _largest(
    parts: Float[np.ndarray, "T n"], loads: _Loads
) -> tuple[Float[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """The share of the largest part in every window, 0 where that is explained, and its number."""
    share = parts.max(axis=1) / np.where(loads.window > 0, loads.window, 1)
    return np.where(loads.left, share, 0), parts.argmax(axis=1)


def _finding(
    kind: Kind,
    message: str,
    windows: Int[np.ndarray, " n"],
    layers: Int[np.ndarray, " m"] | None = None,
) -> Finding:
    return Finding(
        kind, message, tuple(windows.tolist()), () if layers is None else tuple(layers.tolist())
    )


def _named(noun: str, numbers: Int[np.ndarray, " n"]) -> str:
    """A noun and numbers in ascending order: a range where they are one."""
    first, count = numbers[0], len(numbers)
    if count == 1:
        return f"{noun} {first}"
    if numbers[-1] - first == count - 1:
        return f"{noun}s {first} to {numbers[-1]}"
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    return f"{noun}s {', '.join(map(str, numbers[:_NAMED]))}{more}"
