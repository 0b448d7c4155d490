"""Moving weights: from plan to plan, and between checkpoints and slots."""

import math
from functools import reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int32, PyTree

from eplb_jax.checks import LoadLike, is_concrete
from eplb_jax.planning.placement import as_placement, is_valid
from eplb_jax.runtime.layout import Layout, layout_of, put, read_rows
from eplb_jax.runtime.transport import transport
from eplb_jax.transition.moves import moves
from eplb_jax.types import AxisName, Placement, Topology


class Relocated(NamedTuple):
    """Weights, and the plan that they follow."""

    params: PyTree[Array]
    placement: Placement


def relocate(
    params: PyTree[Array | np.ndarray],
    old: Placement | LoadLike,
    new: Placement | LoadLike,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
    ragged: bool = False,
    num_nodes: int = 1,
) -> Relocated:
    """Weights in the slot order of a new plan, from those of the plan in place.

    Every slot gets the row of the expert that `new` puts there, bit for bit, in all leaves: give
    the optimizer's state together with the weights. Empty slots keep what they held. Rows that stay
    on their device are copied there; others go by all-to-alls of one row per device, two for each
    row that the busiest device sends or receives. No table is gathered, and layers that do not
    change are not touched. A new plan compiles nothing. Extra memory: three tables of one layer,
    over all leaves.

    Put the first plan on the mesh, ``jax.device_put(plan, NamedSharding(mesh, PartitionSpec()))``,
    as the returned one is, or the second call compiles again. To spread the work over steps, move
    some layers at a time: `select_layers`. Under `jax.jit` with `params` donated, weights are
    replaced in place.

    Args:
        params: Leaves [L, R, ...], or [R, ...] for the plan of one layer: the slots of a layer in
            order, slot s on device s // (R / G) of the axis.
        old: The plan in place, or its phy2log, [L, R] or [R].
        new: The next plan, of the same layers, slots and experts.
        mesh: The devices of params.
        axis_name: The mesh axis, or axes, over which slots are sharded; G is its size.
        specs: The `PartitionSpec` of every leaf, or of all leaves below a node of the tree. None:
            that of the array on this mesh where it is known, else slots over `axis_name` and
            nothing else sharded.
        ragged: Send exactly the rows that `eplb_jax.moves` lists, by one ragged all-to-all. For
            GPUs and TPUs; untested on real hardware, as XLA has no such operation on CPUs.
        num_nodes: N, for ragged: a row comes from its own node where that has the expert.

    Returns:
        The weights, and the plan that they now follow: `new`. Plans that are not concrete, inside
        `jit` or on other hosts, cannot be rejected: layers where `old` or `new` is invalid keep
        their weights and the plan `old`.

    Raises:
        TypeError: A plan does not hold integers, or is a traced map.
        ValueError: A plan is invalid, plans or leaves differ in shape, or slots are not sharded
            over `axis_name` or not divisible by its size. Nothing has moved then.

    Example:
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> weights = jnp.array([0, 10, 20, 0])
        >>> relocate(weights, [0, 1, 2, 0], [2, 0, 1, 2], mesh).params.tolist()
        [20, 0, 10, 20]
    """
    plans = before, after = _as_plans(old, new)
    layout = layout_of(params, before, mesh, axis_name, specs, "params")
    topology = Topology.of_replicas(before.phy2log.shape[-1], layout.num_gpus, num_nodes)
    valid = [is_valid(x) for x in plans if not all(is_concrete(y) for y in x)]
    before, after = (Placement(*(put(x, layout, PartitionSpec()) for x in plan)) for plan in plans)
    if valid:
        after = _select(before, after, put(reduce(and_, valid), layout, PartitionSpec()))
    held, wanted, source = before.phy2log, after.phy2log, None
    if ragged:  # inside `jit`, where plans are not checked again
        source = jax.jit(moves, static_argnums=2)(held, wanted, topology).source
    maps = held, wanted, jnp.any(held != wanted, axis=-1), before.logcnt.shape[-1]
    leaves, tree = jax.tree.flatten(params)
    return Relocated(tree.unflatten(transport(leaves, layout, *maps, source=source)), after)


def _as_plans(old: Placement | LoadLike, new: Placement | LoadLike) -> tuple[Placement, Placement]:
    """Both plans, checked where they are concrete, of the same experts and shapes."""
    known = [x.logcnt.shape[-1] for x in (old, new) if isinstance(x, Placement)]
    before = as_placement(old, "old", known[0] if known else None)
    after = as_placement(new, "new", before.logcnt.shape[-1])
    for name, x, y in zip(Placement._fields, before, after, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"{name} of new has the shape {y.shape}, but that of old {x.shape}")
    return before, after


def select_layers(
    old: Placement | LoadLike, new: Placement | LoadLike, layers: Bool[Array, "*L"] | LoadLike
) -> Placement:
    """The plan that is `new` in some layers and `old` in the others.

    `relocate` to it moves a few layers per step; `decide` says which are worth moving first.

    Args:
        old: The plan in place, or its phy2log, [L, R] or [R].
        new: The next plan, of the same shape.
        layers: True for the layers of `new`.

    Raises:
        TypeError: A plan does not hold integers, or is a traced map.
        ValueError: A plan is invalid, or shapes or the dtype of layers do not fit.

    Example:
        >>> select_layers([[0, 1], [0, 1]], [[1, 0], [1, 0]], [True, False]).phy2log.tolist()
        [[1, 0], [0, 1]]
    """
    before, after = _as_plans(old, new)
    chosen, shape = jnp.asarray(layers), before.logcnt.shape[:-1]
    if chosen.dtype != bool or chosen.shape != shape:
        raise ValueError(
            f"layers must hold a bool for each layer, of the shape {shape}, got "
            f"{chosen.dtype} {chosen.shape}"
        )
    return _select(before, after, chosen)


@jax.jit
def _select(old: Placement, new: Placement, layers: Bool[Array, "*L"]) -> Placement:
    chosen = (jnp.expand_dims(layers, range(layers.ndim, x.ndim)) for x in new)
    return Placement(*map(jnp.where, chosen, new, old))


def to_slots(
    logical: PyTree[Array | np.ndarray],
    placement: Placement | LoadLike,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """Weights in slot order, from one row per logical expert, as checkpoints have them.

    NumPy leaves are read from the host, every device its own rows. JAX leaves are sharded over
    `axis_name`, experts in order, and then exchanged. Empty slots hold zeros. Differentiable: the
    gradient of an expert is the sum over its slots. Arguments and errors are those of `relocate`,
    with leaves [L, E, ...] or [E, ...].

    Example:
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> to_slots(jnp.array([[0, 10, 20]]), [[0, 1, 2, 0]], mesh).tolist()
        [[0, 10, 20, 0]]
    """
    leaves, tree = jax.tree.flatten(logical)
    num_experts = None  # of a plan; for a map, by the leaves
    if leaves and not isinstance(placement, Placement):
        num_experts = leaves[0].shape[max(np.ndim(placement) - 1, 0)]  # pyright: ignore[reportArgumentType]
    plan = as_placement(placement, "placement", num_experts)
    layout = layout_of(logical, plan, mesh, axis_name, specs, "logical", logical=True)
    rows = np.asarray(plan.phy2log) if is_concrete(plan.phy2log) else None
    return tree.unflatten(
        read_rows(leaf, rows, layout, spec)
        if isinstance(leaf, np.ndarray) and rows is not None
        else _expand(jnp.asarray(leaf), plan, layout._replace(specs=(spec,)))
        for leaf, spec in zip(leaves, layout.specs, strict=True)
    )


def _expand(leaf: Array, plan: Placement, layout: Layout) -> Array:
    """Rows of a logical table in slot order; backwards, sums over the slots of an expert."""
    axis, experts = plan.logcnt.ndim - 1, _experts(plan, layout)
    num_experts = experts.shape[-1]
    every = np.ones(plan.logcnt.shape[:-1], bool)

    @jax.custom_vjp
    def copy(leaf: Array, phy2log: Array) -> Array:
        rows = transport([leaf], layout, experts, phy2log, every, num_experts)[0]
        held = jnp.expand_dims(phy2log >= 0, range(phy2log.ndim, rows.ndim))
        return jnp.where(held, rows, jnp.zeros((), rows.dtype))

    def forward(leaf: Array, phy2log: Array) -> tuple[Array, Array]:
        return copy(leaf, phy2log), phy2log

    def backward(phy2log: Array, grad: Array) -> tuple[Array | None, None]:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return None, None
        sums = transport([grad], layout, phy2log, experts, every, num_experts, add=True)
        return sums[0], None

    copy.defvjp(forward, backward)
    missing = [(0, 0)] * leaf.ndim
    missing[axis] = (0, num_experts - leaf.shape[axis])
    return copy(put(jnp.pad(leaf, missing), layout, layout.specs[0]), plan.phy2log)


def to_logical(
    params: PyTree[Array | np.ndarray],
    placement: Placement | LoadLike,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """One row per logical expert, as checkpoints have them, from weights in slot order.

    The inverse of `to_slots`: the result does not depend on the plan. Experts are sharded over
    `axis_name` in order where its size divides E, else every device has all of them. Arguments and
    errors are those of `relocate`; a plan that is not concrete must be valid.

    Example:
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> to_logical(jnp.array([[0, 10, 20, 0]]), [[0, 1, 2, 0]], mesh).tolist()
        [[0, 10, 20]]
    """
    plan = as_placement(placement, "placement")
    layout = layout_of(params, plan, mesh, axis_name, specs, "params")
    axis, experts = plan.logcnt.ndim - 1, _experts(plan, layout)
    every, num_experts = np.ones(plan.logcnt.shape[:-1], bool), plan.logcnt.shape[-1]
    leaves, tree = jax.tree.flatten(params)
    leaves = transport(leaves, layout, plan.phy2log, experts, every, experts.shape[-1])
    if experts.shape[-1] > num_experts:
        whole = [PartitionSpec(*x[:axis], None, *x[axis + 1 :]) for x in layout.specs]
        leaves = [put(x, layout, y) for x, y in zip(leaves, whole, strict=True)]
        leaves = [lax.slice_in_dim(x, 0, num_experts, axis=axis) for x in leaves]
    return tree.unflatten(leaves)


def _experts(plan: Placement, layout: Layout) -> Int32[np.ndarray, "*L E"]:
    """Experts in order, padded to a multiple of the devices by experts without slots."""
    num_experts = math.ceil(plan.logcnt.shape[-1] / layout.num_gpus) * layout.num_gpus
    experts = np.arange(num_experts, dtype=np.int32)
    return np.broadcast_to(experts, (*plan.logcnt.shape[:-1], num_experts))
