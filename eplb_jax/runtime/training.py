"""Training with replicas: one gradient per logical expert, in all of its slots."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from eplb_jax.checks import LoadLike
from eplb_jax.planning.placement import as_placement
from eplb_jax.runtime.layout import layout_of
from eplb_jax.runtime.transport import transport
from eplb_jax.types import AxisName, Placement


def sum_replicas(
    grads: PyTree[Array | np.ndarray],
    placement: Placement | LoadLike,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """Gradients in which every slot has the gradient of its expert: the sum over its slots.

    Each replica has a gradient from its own tokens. Call it before gradients are clipped or used.
    Sums are formed once, in float32 or wider, and copied, so an optimizer that treats all slots
    alike keeps the weights and moments of replicas equal bit for bit. Only gradients of experts
    with replicas are exchanged, as in `relocate`. Not differentiable.

    Args:
        grads: Leaves [L, R, ...] or, for the plan of one layer, [R, ...], as in `relocate`.
        placement: The plan that the weights follow, or its phy2log, [L, R] or [R].
        mesh: The devices of the gradients.
        axis_name: The mesh axes over which slots are sharded.
        specs: As in `relocate`.

    Raises:
        TypeError: The plan does not hold integers, or is a traced map.
        ValueError: The plan is invalid, leaves do not fit it, or slots are not sharded over
            `axis_name`.

    Example:
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> sum_replicas(jnp.array([5.0, 1.0, 2.0]), [0, 1, 0], mesh).tolist()
        [7.0, 1.0, 7.0]
    """
    plan = as_placement(placement, "placement")
    layout = layout_of(grads, plan, mesh, axis_name, specs, "grads")
    held, changes = plan.phy2log, jnp.any(plan.logcnt > 1, axis=-1)
    leaves, tree = jax.tree.flatten(grads)
    num_experts = plan.logcnt.shape[-1]
    return tree.unflatten(transport(leaves, layout, held, held, changes, num_experts, add=True))


def mask_replicas(
    tree: PyTree[Array | np.ndarray], placement: Placement | LoadLike
) -> PyTree[Array]:
    """The tree with zeros in all slots but the first of every expert.

    For norms over all experts, such as the global norm of gradient clipping, which would count an
    expert once for every replica: ``optax.global_norm(mask_replicas(grads, plan))``. No
    communication.

    Args:
        tree: Leaves [L, R, ...], or [R, ...] for the plan of one layer.
        placement: The plan that they follow, or its phy2log, [L, R] or [R].

    Raises:
        TypeError: The plan does not hold integers, or is a traced map.
        ValueError: A leaf has another shape, or the plan is invalid.

    Example:
        >>> mask_replicas(jnp.array([7.0, 1.0, 7.0]), [0, 1, 0]).tolist()
        [7.0, 1.0, 0.0]
    """
    plan = as_placement(placement, "placement")
    first = jnp.take_along_axis(plan.log2phy[..., 0], plan.phy2log, axis=-1)
    slot = jnp.arange(first.shape[-1], dtype=jnp.int32)
    is_first = first == jnp.broadcast_to(slot, first.shape)

    def mask(leaf: Array) -> Array:
        if leaf.shape[: is_first.ndim] != is_first.shape:
            raise ValueError(
                f"tree has a leaf of the shape {leaf.shape}; by the plan, it begins with "
                f"{is_first.shape}"
            )
        keep = is_first.reshape(is_first.shape + (1,) * (leaf.ndim - is_first.ndim))
        return jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(mask, tree)
