"""The vocabulary of the project: what the axes are called, and what functions take and return.

Axis legend, used in every annotation:

====  =======================================================================
L     MoE layers
E     logical experts of a layer
R     physical slots of a layer ("replicas" in DeepSeek's signature)
G     GPUs (any accelerator rank); slot ``s`` is on GPU ``s // (R // G)``
N     nodes; GPU ``g`` is on node ``g // (G // N)``
n     items to pack
m     packs
c     items per pack, ``n // m``
K     candidates; the last axis, then called lanes
T     windows of time
X     maximum number of replicas of one expert that a map has room for
====  =======================================================================
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32

from eplb_jax.checks import as_count, check_divides, check_multiple

AxisName = str | tuple[str, ...]
"""A mesh axis, or several that are used as one, as `lax.psum` takes them."""


@dataclass(frozen=True)
class Topology:
    """GPUs, their slots and nodes, and the groups of experts: what a plan is made for.

    Frozen and hashable, so it is a static argument of jitted functions, and equal topologies share
    one compilation.

    Attributes:
        num_gpus: G, over all nodes.
        slots: Physical slots of a GPU; a layer has R = slots * num_gpus of them.
        num_nodes: N; divides num_gpus.
        num_groups: Groups of consecutive experts, as in group-limited routing. The hierarchical
            policy keeps the experts of a group on one node.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is less than 1, or num_nodes does not divide num_gpus.

    Example:
        >>> topology = Topology(32, slots=9, num_nodes=4, num_groups=8)
        >>> topology.num_replicas, topology.gpus_per_node
        (288, 8)
    """

    num_gpus: int
    slots: int
    num_nodes: int = 1
    num_groups: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("num_gpus", "slots", "num_nodes", "num_groups"):
            object.__setattr__(self, name, as_count(name, getattr(self, name)))
        check_divides("num_nodes", self.num_nodes, "num_gpus", self.num_gpus)

    @classmethod
    def of_replicas(
        cls, num_replicas: int, num_gpus: int, num_nodes: int = 1, num_groups: int = 1
    ) -> "Topology":
        """The topology with R slots in total; num_gpus must divide num_replicas.

        Example:
            >>> Topology.of_replicas(288, 32)
            Topology(num_gpus=32, slots=9, num_nodes=1, num_groups=1)
        """
        num_gpus = as_count("num_gpus", num_gpus)
        num_replicas = as_count("num_replicas", num_replicas)
        check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus)
        return cls(num_gpus, num_replicas // num_gpus, num_nodes, num_groups)

    @property
    def num_replicas(self) -> int:
        """R, the physical slots of a layer over all GPUs."""
        return self.num_gpus * self.slots

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node."""
        return self.num_gpus // self.num_nodes


def check_topology(topology: Topology, num_slots: int | None = None) -> None:
    """Raise unless it is a `Topology`, of `num_slots` slots where a plan has that many."""
    if not isinstance(topology, Topology):
        raise TypeError(
            f"topology must be an eplb_jax.Topology, got {topology!r}; "
            "for example Topology(8, slots=5)"
        )
    if num_slots is not None and topology.num_replicas != num_slots:
        raise ValueError(
            f"topology has {topology.num_gpus} GPUs of {topology.slots} slots, "
            f"{topology.num_replicas} in total, but the plan has {num_slots} slots"
        )


def check_experts(topology: Topology, num_experts: int) -> None:
    """Raise ValueError if there are fewer slots than experts."""
    if topology.num_replicas < num_experts:
        raise ValueError(
            f"topology has {topology.num_replicas} slots for {num_experts} experts; "
            f"nearest: slots={-(-num_experts // topology.num_gpus)}"
        )


class Packing(NamedTuple):
    """The pack of every item, and its position in that pack."""

    pack_index: Int32[Array, "*L n"]
    rank_in_pack: Int32[Array, "*L n"]


class Replication(NamedTuple):
    """The expert of every replica, its rank from 0 among those of its expert, and their number.

    Replicas are in the order in which they were assigned (`replicate_experts`) or in the order of
    their slots (`plan_replicas`).
    """

    phy2log: Int32[Array, "*L R"]
    rank: Int32[Array, "*L R"]
    logcnt: Int32[Array, "*L E"]


class Placement(NamedTuple):
    """A plan: the expert in every physical slot.

    ``log2phy`` lists the slots of every expert in the order of their rank, padded with -1. The
    plan of one layer is the same without the axis L.
    """

    phy2log: Int32[Array, "*L R"]
    log2phy: Int32[Array, "*L E X"]
    logcnt: Int32[Array, "*L E"]

    def layer(self, index: int | Array) -> "Placement":
        """The plan of one layer, as `lax.scan` over a plan passes it to its step.

        Raises:
            IndexError: There is no such layer.
        """
        if isinstance(index, (int, np.integer)):
            count = len(self.phy2log)
            if not -count <= index < count:
                raise IndexError(f"layer {index} of a plan of {count} layers")
        return Placement(*(x[index] for x in self))
