"""The vocabulary of the project: what the axes are called, and what functions take and return.

Axis legend, used in every annotation:

====  =======================================================================
L     MoE layers
E     logical experts of a layer
R     physical slots of a layer ("replicas" in DeepSeek's signature), GPU by GPU
G     GPUs (any accelerator rank), node by node
N     nodes
n     items to pack
m     packs
c     items per pack, ``n // m``
K     candidates; the last axis, then called lanes
T     windows of time
X     maximum number of replicas of one expert that a map has room for
====  =======================================================================
"""

from collections.abc import Sequence
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
    one compilation. Which GPUs are alive and how fast they are changes while serving: `plan` takes
    that as arrays.

    Attributes:
        num_gpus: G, over all nodes.
        slots: Physical slots of a GPU, or of each one, [G]; 0 for a GPU that takes no experts.
        num_nodes: N; divides num_gpus.
        num_groups: Groups of consecutive experts, as in group-limited routing. The hierarchical
            policy keeps the experts of a group on one node.
        nodes: The node of every GPU, [G], ascending from 0, for nodes of different sizes; num_nodes
            follows. None: nodes of equal size.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is too small, num_nodes does not divide num_gpus, or slots or nodes are
            not one for each GPU.

    Example:
        >>> topology = Topology(32, slots=9, num_nodes=4, num_groups=8)
        >>> topology.num_replicas, topology.gpus_per_node
        (288, 8)
        >>> Topology(3, slots=[2, 2, 1], nodes=[0, 0, 1]).num_replicas
        5
    """

    num_gpus: int
    slots: int | Sequence[int]
    num_nodes: int = 1
    num_groups: int = 1
    nodes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        num_gpus = as_count("num_gpus", self.num_gpus)
        slots, nodes, num_nodes = self.slots, self.nodes, as_count("num_nodes", self.num_nodes)
        if isinstance(slots, Sequence | np.ndarray):
            slots = _one_each("slots", slots, num_gpus)
            slots = slots[0] if len(set(slots)) == 1 else slots
        if not isinstance(slots, tuple):
            slots = as_count("slots", slots)
        if nodes is not None:
            nodes = _one_each("nodes", nodes, num_gpus)
            steps = np.diff([0, *nodes])
            if nodes[0] or not set(steps) <= {0, 1}:
                nearest = tuple(np.sort(np.unique(nodes, return_inverse=True)[1]).tolist())
                raise ValueError(f"nodes={nodes} must ascend from 0 by 1; nearest: {nearest}")
            found = nodes[-1] + 1
            if num_nodes not in (1, found):
                raise ValueError(f"num_nodes={num_nodes}, but nodes has {found}; nearest: {found}")
            num_nodes = found
            if len(set(np.bincount(nodes))) == 1:
                nodes = None
        for name, value in (("num_gpus", num_gpus), ("slots", slots), ("num_nodes", num_nodes)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "num_groups", as_count("num_groups", self.num_groups))
        if nodes is None:
            other = "nodes, the node of every GPU"
            check_divides("num_nodes", num_nodes, "num_gpus", num_gpus, otherwise=other)

    @classmethod
    def of_replicas(
        cls, num_replicas: int, num_gpus: int, num_nodes: int = 1, num_groups: int = 1
    ) -> "Topology":
        """The topology with R slots in total; num_gpus must divide num_replicas.

        Example:
            >>> Topology.of_replicas(288, 32).slots
            9
        """
        num_gpus = as_count("num_gpus", num_gpus)
        num_replicas = as_count("num_replicas", num_replicas)
        check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus)
        return cls(num_gpus, num_replicas // num_gpus, num_nodes, num_groups)

    @property
    def slots_of_gpu(self) -> tuple[int, ...]:
        """The slots of every GPU."""
        return (self.slots,) * self.num_gpus if isinstance(self.slots, int) else tuple(self.slots)

    @property
    def num_replicas(self) -> int:
        """R, the physical slots of a layer over all GPUs."""
        return sum(self.slots_of_gpu)

    @property
    def slots_per_gpu(self) -> int:
        """Slots of a GPU, where all have equally many; ValueError otherwise."""
        if isinstance(self.slots, int):
            return self.slots
        raise ValueError(f"this needs GPUs with equally many slots, got slots={self.slots}")

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node, where all have equally many; ValueError otherwise."""
        if self.nodes is None:
            return self.num_gpus // self.num_nodes
        raise ValueError(f"this needs nodes of equal size, got nodes={self.nodes}")

    @property
    def is_uniform(self) -> bool:
        """Whether GPUs have equally many slots, and nodes equally many GPUs."""
        return isinstance(self.slots, int) and self.nodes is None

    @property
    def node_of_gpu(self) -> np.ndarray:
        """The node of every GPU, int32 [G]."""
        if self.nodes is not None:
            return np.array(self.nodes, np.int32)
        return np.arange(self.num_gpus, dtype=np.int32) // self.gpus_per_node

    @property
    def gpu_of_slot(self) -> np.ndarray:
        """The GPU of every slot, int32 [R]."""
        return np.repeat(np.arange(self.num_gpus, dtype=np.int32), self.slots_of_gpu)

    @property
    def one_node(self) -> "Topology":
        """The same GPUs without nodes and groups."""
        return Topology(self.num_gpus, self.slots)


def _one_each(name: str, values: Sequence[int] | np.ndarray, num_gpus: int) -> tuple[int, ...]:
    """A number of at least 0 for every GPU."""
    if len(values) != num_gpus:
        raise ValueError(f"{name} has {len(values)} numbers for {num_gpus} GPUs; give one for each")
    return tuple(as_count(name, x, least=0) for x in values)


def as_topology(topology: Topology | int, num_slots: int) -> Topology:
    """The topology of a plan of so many slots: the one given, or so many equal GPUs."""
    if isinstance(topology, (int, np.integer)):
        return Topology.of_replicas(num_slots, int(topology))
    check_topology(topology, num_slots)
    return topology


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

    ``log2phy`` lists the slots of every expert in the order of their rank, padded with -1. Slots of
    GPUs that are not alive hold -1. The plan of one layer is the same without the axis L.
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
