"""Training with replicas: one gradient per logical expert, in all of its slots."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from eplb_jax.planning.placement import as_placement, count_replicas
from eplb_jax.runtime.layout import layout_of
from eplb_jax.types import AxisName, Placement


def sum_replicas(
    grads: PyTree[Array],
    placement: Placement,
    mesh: Mesh,
    axis_name: AxisName = "expert",
    *,
    specs: PyTree[PartitionSpec] | None = None,
) -> PyTree[Array]:
    """Every slot gets the gradient of its expert: the sum over the expert's slots.

    Each replica has seen other tokens. Call it before anything that looks at gradients; an
    optimizer that treats slots alike then keeps weights and moments of replicas equal bit for bit,
    as the sum is formed once, in float32 or wider, and copied: no drift, and no broadcast after the
    step. Rows travel as in `relocate`, in as many rounds as the busiest device has slots of experts
    with replicas; other experts stay where they are. Not to be differentiated.

    Args:
        grads: Leaves [L, R, ...] or, for the plan of one layer, [R, ...], as of `relocate`.
        placement: The plan that the weights follow.
        mesh: Where gradients lie.
        axis_name: The mesh axes over which slots are sharded.
        specs: As of `relocate`.

    Raises:
        ValueError: Leaves and plan do not fit, or slots are not sharded over `axis_name`.

    Example:
        >>> from eplb_jax.types import Placement
        >>> mesh = jax.make_mesh((1,), ("expert",))
        >>> maps = jnp.array([0, 1, 0]), jnp.array([[0, 2], [1, -1]]), jnp.array([2, 1])
        >>> sum_replicas(jnp.array([5.0, 1.0, 2.0]), Placement(*maps), mesh).tolist()
        [7.0, 1.0, 7.0]
    """
    as_placement(placement, "placement")
    layout = layout_of(grads, placement, mesh, axis_name, specs, "grads")
    held, num_experts = placement.phy2log, placement.logcnt.shape[-1]
    changes = jnp.any(count_replicas(held, num_experts) > 1, axis=-1)
    leaves = jax.tree.leaves(grads)
    leaves = layout.carried(leaves, held, held, changes, num_experts, add=True)
    return jax.tree.unflatten(layout.tree, leaves)


def counted_once(tree: PyTree[Array], placement: Placement) -> PyTree[Array]:
    """Zero but in the first slot of every expert: what a norm over all experts may add up.

    A global norm, as gradients are clipped by, would count an expert once for every replica. Needs
    no communication: ``optax.global_norm(counted_once(grads, plan))``.

    Args:
        tree: Leaves [L, R, ...], or [R, ...] for the plan of one layer.
        placement: The plan that they follow.

    Raises:
        ValueError: A leaf has another shape, or the plan is none.

    Example:
        >>> from eplb_jax.types import Placement
        >>> maps = jnp.array([0, 1, 0]), jnp.array([[0, 2], [1, -1]]), jnp.array([2, 1])
        >>> counted_once(jnp.array([7.0, 1.0, 7.0]), Placement(*maps)).tolist()
        [7.0, 1.0, 0.0]
    """
    as_placement(placement, "placement")
    first = jnp.take_along_axis(placement.log2phy[..., 0], placement.phy2log, axis=-1)
    is_first = first == jnp.arange(first.shape[-1], dtype=jnp.int32)

    def once(leaf: Array) -> Array:
        if leaf.shape[: is_first.ndim] != is_first.shape:
            raise ValueError(
                f"tree has a leaf of the shape {leaf.shape}; by the plan, it begins with "
                f"{is_first.shape}"
            )
        mask = is_first.reshape(is_first.shape + (1,) * (leaf.ndim - is_first.ndim))
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(once, tree)
