"""Loads of experts, counted inside a running model."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int32, Integer, Num
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_count, as_experts
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import AxisName, Placement


def expert_counts(
    ids: Integer[Array, "... k"],
    num_experts: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, " E"]:
    """The number of tokens that a router sends to every logical expert of a layer.

    Exact up to 2^31 - 1 tokens per expert and call; `eplb_jax.update_history` adds calls without
    overflow.

    Args:
        ids: Routed experts, of any shape. Ids that are negative, or not below E, are not counted.
        num_experts: E.
        mask: False for ids that are not counted, such as padding: of the shape of ids, or of its
            tokens, without the last axis.
        axis_name: Mesh axes to sum over, inside `jax.shard_map`. Elsewhere arrays are global, and
            so is the sum.

    Raises:
        TypeError: ids are not integers.
        ValueError: The mask has another shape.

    Example:
        >>> ids = jnp.array([[0, 2], [2, 1], [0, 0]])
        >>> expert_counts(ids, 4, mask=jnp.array([True, True, False])).tolist()
        [1, 1, 2, 0]
    """
    num_experts = as_count("num_experts", num_experts)
    ids = as_ids(ids)
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.shape not in (ids.shape, ids.shape[:-1]):
            raise ValueError(
                f"mask must have the shape of ids, {ids.shape}, or of its tokens, "
                f"{ids.shape[:-1]}, got {mask.shape}"
            )
    load = under_auto(partial(_load, num_experts=num_experts), PartitionSpec(), ids, mask)
    return load if axis_name is None else lax.psum(load, axis_name)


@partial(jax.jit, static_argnames="num_experts")
def _load(
    ids: Integer[Array, "... k"], mask: Bool[Array, "..."] | None, *, num_experts: int
) -> Int32[Array, " E"]:
    counted = is_expert(ids, num_experts)
    if mask is not None:
        counted &= mask if mask.shape == ids.shape else mask[..., None]
    row = jnp.where(counted, ids.astype(jnp.int32), num_experts)  # past the last
    return jnp.zeros(num_experts, jnp.int32).at[row].add(1, mode="drop")


def as_ids(ids: ArrayLike) -> Integer[Array, "..."]:
    """Ids as an array; raises TypeError unless they are integers."""
    array = jnp.asarray(ids)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, got dtype {array.dtype}")
    return array


def is_expert(ids: Integer[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
    """True for ids of experts; others, negative or not below E, are padding."""
    # num_experts need not fit in a smaller type, nor an id in 32 bits.
    wide = ids if jnp.dtype(ids.dtype).itemsize > 4 else ids.astype(jnp.int32)
    return (wide >= 0) & (wide < num_experts)


def expert_counts_from_slots(
    slots: Integer[Array, "... k"],
    phy2log: Placement | LoadLike,
    num_experts: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, " E"]:
    """The number of tokens of every logical expert, from the slots that they were routed to.

    Args:
        slots: Slots in the plan of the layer, of any shape; as the ids of `expert_counts`.
        phy2log: The expert in every slot, [R], or the plan of the layer.
        num_experts: E.
        mask: As in `expert_counts`.
        axis_name: As in `expert_counts`.

    Raises:
        TypeError: slots or phy2log are not integers.
        ValueError: The mask has another shape, or phy2log an invalid expert or a second axis.

    Example:
        >>> expert_counts_from_slots(jnp.array([[0, 2], [3, 1]]), [0, 1, 0, 2], 3).tolist()
        [2, 1, 1]
    """
    experts = as_experts(phy2log, "phy2log", num_experts=num_experts)
    counts = expert_counts(slots, experts.shape[-1], mask=mask, axis_name=axis_name)
    return slot_to_expert_counts(counts, experts, num_experts)


def slot_to_expert_counts(
    counts: Num[Array, "*TL R"],
    phy2log: Placement | LoadLike,
    num_experts: int,
    *,
    axis_name: AxisName | None = None,
) -> Num[Array, "*TL E"]:
    """The load of every logical expert: sums of counts over its slots; empty ones do not count.

    Args:
        counts: Tokens of every slot, [R], [L, R] or [T, L, R].
        phy2log: The expert in every slot, [R] or [L, R], or the plan.
        num_experts: E.
        axis_name: Mesh axes to sum over, inside `jax.shard_map`.

    Returns:
        Loads in the dtype of counts, in 32 bits where that has fewer.

    Raises:
        TypeError: phy2log does not hold integers.
        ValueError: Shapes do not fit, or phy2log has an invalid expert.

    Example:
        >>> slot_to_expert_counts(jnp.array([5, 3, 2, 1]), [0, 1, 0, 2], 3).tolist()
        [7, 3, 1]
    """
    num_experts = as_count("num_experts", num_experts)
    if jnp.dtype(counts.dtype).itemsize < 4:
        floats = jnp.issubdtype(counts.dtype, jnp.floating)
        counts = counts.astype(jnp.float32 if floats else jnp.int32)
    experts = as_experts(phy2log, "phy2log", num_experts=num_experts)
    if counts.shape[-experts.ndim :] != experts.shape:
        raise ValueError(f"counts have the shape {counts.shape}, but phy2log {experts.shape}")

    def add(counts: Num[Array, " R"], experts: Int32[Array, " R"]) -> Num[Array, " E"]:
        return jnp.zeros(num_experts, counts.dtype).at[experts].add(counts, mode="drop")

    experts = jnp.where(experts < 0, num_experts, experts)  # past the last
    experts = jnp.broadcast_to(experts, counts.shape)
    add_all = jnp.vectorize(add, signature="(r),(r)->(e)")
    load = under_auto(add_all, PartitionSpec(*spec_of(counts)[:-1]), counts, experts)
    return load if axis_name is None else lax.psum(load, axis_name)
