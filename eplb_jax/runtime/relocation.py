"""Weights that follow a plan: from slots to slots, and between slots and checkpoints."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int32, PyTree

from eplb_jax.checks import as_count, check_divides, is_concrete
from eplb_jax.planning.placement import as_placement, is_valid
from eplb_jax.runtime.layout import Layout, layout_of
from eplb_jax.transition.moves import moves
from eplb_jax.types import AxisName, Placement


class Relocated(NamedTuple):
    """Weights, and the plan that they follow."""

    params: PyTree[Array]
    placement: Placement


def relocate(
    params: PyTree[Array],
    old: Placement,
    new: Placement,
    mesh: Mesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
    ragged: bool = False,
    num_nodes: int = 1,
) -> Relocated:
    """Move weights, in slot order and sharded over a mesh axis, from one plan to another.

    Every slot ends up with the row of the expert that `new` gives it, bit for bit, in all leaves
    alike: give the optimizer's state along with the weights. Rows that stay on their device are
    copied there; others go by two all-to-alls of one row a round and device, as many rounds as the
    busiest device has rows to send and to fetch (`transport`): at most 2 (G - 1) / G rows a round
    leave a device, no table is gathered, layers without change do not even copy, and another
    plan does not compile anything anew. Extra memory is three tables of one layer, over all
    leaves.

    The plan that comes back lies on the mesh, and so should the first one,
    ``jax.device_put(plan, NamedSharding(mesh, PartitionSpec()))``, or the second call compiles
    once more. Inside the caller's `jax.shard_map` a plan is an argument, with `PartitionSpec()`.

    Layers whose plan stays move nothing, so that work is spread over steps by plans in which only
    some layers are new: see `some_layers`. Under `jax.jit` with `params` donated, weights are
    replaced in place.

    Args:
        params: Leaves [L, R, ...], or [R, ...] for the plan of one layer: a layer's slots in order,
            slot s on device s // (R / G) of the axis. All of one R.
        old: The plan in place.
        new: The plan to come, for as many layers, slots and experts.
        mesh: Where params lie, or are to lie.
        axis_name: The mesh axis, or axes, over which slots are sharded; G is its size.
        specs: The `PartitionSpec` of every leaf, or of all below a node of the tree. None: the one
            that an array has on this mesh, where it can be seen, else slots over `axis_name` and
            nothing else sharded.
        ragged: Rows go from slot to slot by one ragged all-to-all: no more bytes than
            `eplb_jax.moves` says, and between the GPUs that it says. On GPUs and TPUs; XLA has no
            such operation on a CPU, so the tests run a model of it, and it has run on neither.
        num_nodes: For ragged: N; a row comes from its own node where that has the expert.

    Returns:
        The weights, and the plan that they follow now: `new`. Inside `jit`, and where plans lie on
        other hosts, values cannot be seen and refused: layers in which one of them is no plan stay
        as they are, and their plan is `old`. Weights and plan never part.

    Raises:
        TypeError: A plan is not a `Placement`.
        ValueError: Before anything moves: `new` lacks an expert, lists a slot twice or has maps
            that contradict each other; plans or leaves are of other shapes; slots are not
            sharded over `axis_name` or do not divide by its size.

    Example:
        >>> import eplb_jax
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> old = eplb_jax.rebalance_experts([[9, 3, 2, 1]], 6, 1, 1, 1)
        >>> new = eplb_jax.rebalance_experts([[1, 2, 3, 9]], 6, 1, 1, 1)
        >>> weights = {"up": old.phy2log * 10}  # the row of expert e is 10 e
        >>> moved, plan = relocate(weights, old, new, mesh)
        >>> bool((moved["up"] == plan.phy2log * 10).all())
        True
    """
    as_placement(old, "old")
    as_placement(new, "new")
    for name, x, y in zip(Placement._fields, old, new, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"{name} of new has the shape {y.shape}, but that of old {x.shape}")
    layout = layout_of(params, old, mesh, axis_name, specs, "params")
    check_divides(
        "num_nodes", as_count("num_nodes", num_nodes), "size of axis_name", layout.num_gpus
    )
    old, new = (Placement(*(layout.everywhere(x) for x in plan)) for plan in (old, new))
    plan = some_layers(old, new, is_valid(old) & is_valid(new))
    changes = jnp.any(old.phy2log != plan.phy2log, axis=-1)
    source = None
    if ragged:
        held, wanted = (jnp.atleast_2d(x.phy2log) for x in (old, plan))
        source = moves(held, wanted, layout.num_gpus, num_nodes).source.reshape(old.phy2log.shape)
    maps = old.phy2log, plan.phy2log, changes, old.logcnt.shape[-1]
    leaves = layout.carried(jax.tree.leaves(params), *maps, source=source)
    return Relocated(jax.tree.unflatten(layout.tree, leaves), plan)


def some_layers(old: Placement, new: Placement, layers: Bool[Array, "*L"]) -> Placement:
    """The plan that is `new` in these layers and `old` in all others.

    To move a few layers a step, in the order that `decide` gives: ``relocate(params, plan,
    some_layers(plan, new, chosen), mesh)``, with the layers chosen as an array of booleans.
    """
    layers = jnp.asarray(layers)
    if layers.dtype != bool or layers.shape != old.logcnt.shape[:-1]:
        raise ValueError(
            f"layers must hold a bool for each layer, of the shape {old.logcnt.shape[:-1]}, got "
            f"{layers.dtype} {layers.shape}"
        )
    return _chosen(old, new, layers)


@jax.jit
def _chosen(old: Placement, new: Placement, layers: Bool[Array, "*L"]) -> Placement:
    choose = lambda x, y: jnp.where(jnp.expand_dims(layers, range(layers.ndim, x.ndim)), y, x)  # noqa: E731
    return Placement(*(choose(x, y) for x, y in zip(old, new, strict=True)))


def to_slots(
    logical: PyTree[Array | np.ndarray],
    placement: Placement,
    mesh: Mesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """Weights in slot order, from one row per logical expert, as checkpoints have them.

    NumPy arrays are read row by row where they are needed, and no device talks to another. JAX
    arrays are sharded over `axis_name`, experts in order, where its size divides E, and on all
    devices alike where it does not. Differentiable: the gradient of an expert is the sum over its
    slots. Arguments and errors are those of `relocate`, with leaves [L, E, ...] or [E, ...].

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[9, 3, 2, 1]], 6, 1, 1, 1)
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> slots = to_slots({"up": jnp.arange(4)[None] * 10}, plan, mesh)["up"]
        >>> bool((slots == plan.phy2log * 10).all())
        True
    """
    as_placement(placement, "placement")
    layout = layout_of(logical, placement, mesh, axis_name, specs, "logical", logical=True)
    leaves, seen = jax.tree.leaves(logical), is_concrete(placement.phy2log)
    if seen and all(isinstance(x, np.ndarray) for x in leaves):
        leaves = layout.read(leaves, np.asarray(placement.phy2log))
    elif placement.logcnt.shape[-1] % layout.num_gpus:
        leaves = layout.taken([jnp.asarray(x) for x in leaves], placement.phy2log)
    else:
        leaves = _copied_out([jnp.asarray(x) for x in leaves], placement, layout)
    return jax.tree.unflatten(layout.tree, leaves)


def _copied_out(leaves: list[Array], placement: Placement, layout: Layout) -> list[Array]:
    """Rows of logical tables in slot order; backwards, sums over the slots of an expert."""
    num_experts = placement.logcnt.shape[-1]
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    specs = tuple(x for x, y in zip(layout.specs, inexact, strict=True) if y)
    of_floats = dataclasses.replace(layout, specs=specs)

    @jax.custom_vjp
    def copied(leaves: list[Array], plan: Placement) -> list[Array]:
        experts, every = _all_experts(plan)
        return layout.carried(leaves, experts, plan.phy2log, every, num_experts)

    def forward(leaves: list[Array], plan: Placement) -> tuple[list[Array], Placement]:
        return copied(leaves, plan), plan

    def backward(plan: Placement, grads: list[Array]) -> tuple[list[Array | None], None]:
        experts, every = _all_experts(plan)
        some = [x for x, y in zip(grads, inexact, strict=True) if y]
        maps = plan.phy2log, experts, every, num_experts
        sums = iter(of_floats.carried(some, *maps, add=True))
        return [next(sums) if y else None for y in inexact], None

    copied.defvjp(forward, backward)
    return copied(leaves, placement)


def to_logical(
    params: PyTree[Array],
    placement: Placement,
    mesh: Mesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """One row per logical expert, as checkpoints have them, from weights in slot order.

    The inverse of `to_slots`, and independent of any plan; experts are sharded over `axis_name` in
    order where its size divides E, and lie on all devices where it does not. Arguments and errors
    are those of `relocate`; inside `jit`, where a plan cannot be seen, it must be one.
    """
    as_placement(placement, "placement")
    layout = layout_of(params, placement, mesh, axis_name, specs, "params")
    leaves, experts = jax.tree.leaves(params), _all_experts(placement)
    if placement.logcnt.shape[-1] % layout.num_gpus:
        leaves = layout.gathered(leaves, placement.log2phy[..., 0])
    else:
        num_experts = placement.logcnt.shape[-1]
        leaves = layout.carried(leaves, placement.phy2log, *experts, num_experts)
    return jax.tree.unflatten(layout.tree, leaves)


def _all_experts(placement: Placement) -> tuple[Int32[Array, "*L E"], Bool[Array, "*L"]]:
    """Logical order as a layout, and every layer."""
    shape = placement.logcnt.shape
    experts = jnp.arange(shape[-1], dtype=jnp.int32)
    return jnp.broadcast_to(experts, shape), jnp.ones(shape[:-1], bool)
