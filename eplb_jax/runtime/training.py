"""Training with replicas: one gradient per logical expert, in all of its slots."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from eplb_jax.runtime.counting import AxisName
from eplb_jax.runtime.relocation import slot_layout
from eplb_jax.types import Placement


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
    as the sum is formed once and copied: no drift, and no broadcast after the step. Only rows of
    experts with replicas leave their device, each twice, (G - 1) / G of it. Sums are formed in
    float32, or wider.

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
    layout = slot_layout(grads, placement, mesh, axis_name, specs)
    held, changes = placement.phy2log, jnp.any(placement.logcnt > 1, axis=-1)
    num_experts = placement.logcnt.shape[-1]
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

    Example:
        >>> from eplb_jax.types import Placement
        >>> maps = jnp.array([0, 1, 0]), jnp.array([[0, 2], [1, -1]]), jnp.array([2, 1])
        >>> counted_once(jnp.array([7.0, 1.0, 7.0]), Placement(*maps)).tolist()
        [7.0, 1.0, 0.0]
    """
    first = jnp.take_along_axis(placement.log2phy[..., 0], placement.phy2log, axis=-1)
    is_first = first == jnp.arange(first.shape[-1], dtype=jnp.int32)

    def once(leaf: Array) -> Array:
        mask = is_first.reshape(is_first.shape + (1,) * (leaf.ndim - is_first.ndim))
        return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(once, tree)
