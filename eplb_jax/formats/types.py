"""What every format is read to and written from."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from eplb_jax.formats.sources import Source
from eplb_jax.types import Topology

LAST_IS_SEEN = "expert {} is the last one seen; num_experts says if there are more"
"""A note on files that do not say how many experts there are."""


class Recording(NamedTuple):
    """Loads as an engine recorded them, the oldest window first.

    Attributes:
        load: Tokens routed to every logical expert, [T, L, E], int64; float64 where the file holds
            fractions.
        layers: The number of every layer as the file has it; from 0 where it has none.
        phases: "prefill" or "decode" for every window; empty where the file does not say.
        phy2log: The map in place while recording, [L, R]; None where the file has none.
        num_gpus: G of that map; None where the file does not say.
        num_layers: All layers of the model, with those that are not MoE layers; None if not known.
        format: The name of the format.
        notes: What the reader left out or assumed, one sentence each.
    """

    load: np.ndarray
    layers: tuple[int, ...]
    phases: tuple[str, ...] = ()
    phy2log: Int[np.ndarray, "L R"] | None = None
    num_gpus: int | None = None
    num_layers: int | None = None
    format: str = ""
    notes: tuple[str, ...] = ()


class PlanFile(NamedTuple):
    """A plan as a file holds it.

    Attributes:
        phy2log: The expert in every slot, [L, R], GPU by GPU; -1 for an empty slot.
        layers: The number of every layer.
        num_experts: E.
        topology: GPUs, slots and nodes; None where the file does not say.
        num_layers: All layers of the model, with those that are not MoE layers; None if not known.
        format: The name of the format.
        notes: What the reader left out or assumed, one sentence each.
    """

    phy2log: Int[np.ndarray, "L R"]
    layers: tuple[int, ...]
    num_experts: int
    topology: Topology | None = None
    num_layers: int | None = None
    format: str = ""
    notes: tuple[str, ...] = ()


class Format(NamedTuple):
    """A dialect: how its files are recognised, read and written.

    Readers and writers raise ValueError with a message that does not name the file; `read`,
    `read_plan` and `write_plan` add its name.

    Attributes:
        name: What `format=` and the command line call it.
        title: The system and the file, in a few words.
        matches: Whether a file is certainly of this format, by its content.
        read: The loads in a file; None for a format of plans.
        read_plan: The plan in a file; None for a format of loads. A format whose loads come with
            the map in place needs none.
        write_plan: The bytes of a plan file; None if the system reads none.
    """

    name: str
    title: str
    matches: Callable[[Source], bool]
    read: Callable[[Source], Recording] | None = None
    read_plan: Callable[[Source], PlanFile] | None = None
    write_plan: Callable[[PlanFile], bytes] | None = None


def numbered(count: int) -> tuple[int, ...]:
    """Layer numbers from 0, for files that have none."""
    return tuple(range(count))


def moe_layers(load: np.ndarray) -> tuple[np.ndarray, tuple[int, ...], tuple[str, ...]]:
    """Loads [T, L, E] of all layers of a model without those that have none in any window.

    Recorders that keep a row for every layer leave the rows of dense layers at zero.

    Returns:
        The loads that remain, the numbers of their layers, and a note on those left out.
    """
    kept = load.any(axis=(0, 2))
    layers = tuple(np.flatnonzero(kept).tolist())
    if kept.all():
        return load, layers, ()
    dense = ", ".join(map(str, np.flatnonzero(~kept)))
    note = f"layers without load are left out, as dense layers have none: {dense}"
    return load[:, kept], layers, (note,)


def logical_load(physical: np.ndarray, phy2log: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens of every expert, [T, L, E], from those of every slot, [T, L, R], under a map [L, R].

    Raises:
        ValueError: The shapes differ, or an empty slot has tokens.
    """
    if physical.shape[1:] != phy2log.shape:
        raise ValueError(
            f"counts of the shape {physical.shape[1:]} and a map of the shape {phy2log.shape}; "
            "both must be [layers, slots]"
        )
    if np.any(physical[:, phy2log < 0]):
        raise ValueError("slots that the map says are empty have tokens; is it the right map?")
    order = np.argsort(phy2log, axis=1, kind="stable")
    ordered = np.take_along_axis(physical, order[None], axis=2)
    total = np.cumsum(np.pad(ordered, ((0, 0), (0, 0), (1, 0))), axis=2, dtype=np.int64)
    experts = np.take_along_axis(phy2log, order, axis=1)
    ends = [np.searchsorted(x, np.arange(-1, num_experts), side="right") for x in experts]
    return np.diff(np.take_along_axis(total, np.stack(ends)[None], axis=2), axis=2)
