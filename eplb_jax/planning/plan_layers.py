"""Plans whose layers use different numbers of slots."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_key
from eplb_jax.planning.forecast import as_load_or_history, as_weights, layers_and_experts
from eplb_jax.planning.history import History
from eplb_jax.planning.per_node import fresh_plan
from eplb_jax.planning.placement import place
from eplb_jax.planning.policy import Policy, is_hierarchical
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_jax.types import Placement, Replication, Topology, check_topology


def plan_layers(
    load: LoadLike | History,
    topology: Topology,
    spares: ArrayLike,
    *,
    weights: LoadLike | Literal["equal"] | None = None,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    check: bool = True,
) -> Placement:
    """`plan` with a number of spare slots for every layer, as `spread_slots` gives them.

    A layer with r spares holds E + r replicas: ceil((E + r) / G) on a GPU, or one less. Which GPUs
    have one less is free in every layer, as GPUs are alike; it is chosen so that over all layers
    every GPU holds as many replicas as any other, or one less: weights take the same memory
    everywhere. Slots that a layer does not use hold -1 and are the last ones of their GPU. `moves`,
    `decide`, `metrics` and `runtime` take such plans as others.

    Layers are planned as by `plan`, those with equally many slots a GPU by one program. Empty slots
    are the replicas of one more expert, without load. Runs on the host and cannot be traced; which
    GPUs of a layer have one less depends on the layers before it.

    Args:
        load: Of at least one layer: [L, E], [T, L, E] or a history, as of `plan`.
        topology: GPUs with equally many slots: the most that any layer may use.
        spares: Spare slots of every layer over all GPUs, [L], each from 0 to R - E.
        weights: As of `plan`, and so are all that follow.
        policy: "global", "hierarchical" or "auto". The hierarchical policy also gives nodes equally
            many spare slots, or one less in some layers.
        strategy: How hard to search. Also with "greedy", replicas of an expert are kept apart.
        key: For strategies that draw at random.
        check: Whether to reject invalid loads.

    Returns:
        The plan: the expert in every slot, int32 [L, R], -1 in empty ones; the slots and the
        replicas of every expert, as of `plan`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `plan`, or spares are not one valid number for each layer.

    Example:
        >>> plan_layers([[8, 1, 1], [2, 2, 2]], Topology(2, slots=2), [1, 0]).phy2log.tolist()
        [[0, 1, 0, 2], [2, -1, 0, 1]]

    References:
        CRAFT, 2026 (arXiv:2603.28768): layers with different numbers of replicas, and equally many
        on every GPU in total.
    """
    array = as_load_or_history(load, "load", least_axes=2, check=check)
    num_layers, num_experts = layers_and_experts(array)
    check_topology(topology)
    hierarchical = is_hierarchical(topology, policy, num_experts)
    num_gpus, most = topology.num_gpus, topology.slots_per_gpu
    used = num_experts + as_spares(spares, topology, num_layers, num_experts)
    size = -(-used // num_gpus)
    nodes = topology if hierarchical else topology.one_node
    empty = _empty_slots(size * num_gpus - used, nodes.num_nodes)
    options = array, as_weights(weights, array), as_key(key)

    expert, rank = np.full((2, num_layers, num_gpus, most), -1, np.int32)
    for slots in np.unique(size).tolist():
        here = size == slots
        inside = Topology(num_gpus, slots, nodes.num_nodes, nodes.num_groups)
        holes = jnp.asarray(np.where(here[:, None], empty, 0))
        search = {"topology": inside, "strategy": resolve_strategy(strategy)}
        found = fresh_plan(*options, holes, **search)
        for table, value in zip((expert, rank), found, strict=False):
            by_gpu = np.asarray(value).reshape(num_layers, num_gpus, slots)
            table[here, :, :slots] = by_gpu[here]
    order = _balanced_order(np.sum(expert < 0, axis=2), nodes.num_nodes)
    expert, rank = (np.take_along_axis(x, order[:, :, None], axis=1) for x in (expert, rank))
    last = np.argsort(expert < 0, axis=2, kind="stable")
    expert, rank = (np.take_along_axis(x, last, axis=2) for x in (expert, rank))
    expert, rank = (jnp.asarray(x.reshape(num_layers, -1)) for x in (expert, rank))
    held = jnp.asarray(np.stack([np.bincount(x[x >= 0], minlength=num_experts) for x in expert]))
    return place(Replication(expert, rank, held))


def as_spares(
    spares: ArrayLike, topology: Topology, num_layers: int, num_experts: int
) -> Int32[np.ndarray, " L"]:
    """Spare slots of every layer, checked.

    Raises:
        TypeError: They are not integers.
        ValueError: They are not one for each layer, or a layer has no room for them.
    """
    array = np.asarray(spares)
    if array.dtype.kind not in "iu":
        raise TypeError(f"spares must be integers, got dtype {array.dtype}")
    if array.shape != (num_layers,):
        raise ValueError(f"spares must have the shape ({num_layers},), got {array.shape}")
    room = topology.num_replicas - num_experts
    for layer in np.flatnonzero((array < 0) | (array > room))[:1]:
        raise ValueError(
            f"spares of layer {layer} are {array[layer]}, but the topology has room for 0 to "
            f"{room}; nearest: {min(max(int(array[layer]), 0), room)}"
        )
    return array.astype(np.int32)


def _empty_slots(missing: Int32[np.ndarray, " L"], num_nodes: int) -> Int32[np.ndarray, "L N"]:
    """How many GPUs of every node have one slot less, so that nodes have equally many in total."""
    empty = np.zeros((len(missing), num_nodes), np.int32)
    total = np.zeros(num_nodes, np.int64)
    for row, count in zip(empty, missing, strict=True):
        row += count // num_nodes
        row[np.argsort(total + row, kind="stable")[: count % num_nodes]] += 1
        total += row
    return empty


def _balanced_order(empty: np.ndarray, num_nodes: int) -> np.ndarray:
    """The GPU of a layer's plan that every GPU takes, [L, G]; those of a node stay on it.

    The GPU with the fewest empty slots so far takes the one with the most. Where these differ by
    one in a layer, totals differ by at most one after every layer: by induction.
    """
    num_layers, num_gpus = empty.shape
    order = np.tile(np.arange(num_gpus), (num_layers, 1))
    total = np.zeros(num_gpus, np.int64)
    for gpus in np.split(np.arange(num_gpus), num_nodes):
        for layer in range(num_layers):
            holes = empty[layer, gpus]
            if holes.min() < holes.max():
                few = gpus[np.argsort(total[gpus], kind="stable")]
                order[layer, few] = gpus[np.argsort(-holes, kind="stable")]
            total[gpus] += empty[layer, order[layer, gpus]]
    return order
