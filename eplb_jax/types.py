"""The vocabulary of the project: what the axes are called, and what the functions return.

Axis legend, used in every annotation:

====  =======================================================================
L     MoE layers
E     logical experts of a layer
R     physical slots of a layer ("replicas" in DeepSeek's signature)
G     GPUs (any accelerator rank); slot ``s`` lies on GPU ``s // (R // G)``
N     nodes; GPU ``g`` lies on node ``g // (G // N)``
n     items to pack
m     packs
c     items per pack, ``n // m``
K     candidates; always the last axis, then called lanes
T     windows of time
X     most replicas of one expert that a map has room for
====  =======================================================================
"""

from typing import NamedTuple

from jaxtyping import Array, Int32

AxisName = str | tuple[str, ...]
"""A mesh axis, or several that make up one, as `lax.psum` takes them."""


class Packing(NamedTuple):
    """Which pack every item lies in, and its place there."""

    pack_index: Int32[Array, "L n"]
    rank_in_pack: Int32[Array, "L n"]


class Replication(NamedTuple):
    """Which expert every physical replica copies.

    ``rank`` numbers the replicas of one expert from 0; ``logcnt`` is how many there are. Replicas
    stand in the order in which they were given out, or, once placed, in the order of their slots.
    """

    phy2log: Int32[Array, "L R"]
    rank: Int32[Array, "L R"]
    logcnt: Int32[Array, "L E"]


class Placement(NamedTuple):
    """A plan: which expert every physical slot holds.

    ``log2phy`` lists the slots of every expert in the order of their rank, padded with -1. The
    plan of one layer is the same without the axis L.
    """

    phy2log: Int32[Array, "*L R"]
    log2phy: Int32[Array, "*L E X"]
    logcnt: Int32[Array, "*L E"]

    def layer(self, index: int | Array) -> "Placement":
        """The plan of one layer, as `lax.scan` over a plan hands it to its step.

        Raises:
            IndexError: There is no such layer.
        """
        if isinstance(index, int) and not -len(self.phy2log) <= index < len(self.phy2log):
            raise IndexError(f"layer {index} of a plan of {len(self.phy2log)} layers")
        return Placement(*(x[index] for x in self))
