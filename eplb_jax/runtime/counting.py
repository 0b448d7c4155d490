"""Loads of experts, counted inside a running model: per step, per mesh, over past windows."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, Num
from numpy.typing import ArrayLike

from eplb_jax.checks import as_count
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import AxisName


def load_of_ids(
    ids: Int[Array, "... k"],
    num_experts: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, " E"]:
    """How many tokens a router sends to every logical expert of a layer.

    Exact up to 2^31 - 1 tokens an expert and call; `recorded` adds calls up without overflow.

    Args:
        ids: Routed experts, of any shape. What is negative, or not below E, is not counted.
        num_experts: E.
        mask: False for what is not to be counted, such as padding: of the shape of ids, or of its
            tokens, without the last axis.
        axis_name: Mesh axes to sum over, inside `jax.shard_map`. Elsewhere arrays are global, and
            the sum is over all devices without it.

    Raises:
        TypeError: ids are not whole numbers.
        ValueError: The mask has another shape.

    Example:
        >>> ids = jnp.array([[0, 2], [2, 1], [0, 0]])
        >>> load_of_ids(ids, 4, mask=jnp.array([True, True, False])).tolist()
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
    ids: Int[Array, "... k"], mask: Bool[Array, "..."] | None, *, num_experts: int
) -> Int32[Array, " E"]:
    counted = is_expert(ids, num_experts)
    if mask is not None:
        counted &= mask if mask.shape == ids.shape else mask[..., None]
    row = jnp.where(counted, ids.astype(jnp.int32), num_experts)  # past the last
    return jnp.zeros(num_experts, jnp.int32).at[row].add(1, mode="drop")


def as_ids(ids: ArrayLike) -> Int[Array, "..."]:
    """Ids as an array; raises TypeError unless they are whole numbers."""
    array = jnp.asarray(ids)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"ids must be whole numbers, got dtype {array.dtype}")
    return array


def is_expert(ids: Int[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
    """Which ids are of experts; others, negative or not below E, are padding."""
    # num_experts need not fit in a smaller type, nor an id in 32 bits.
    wide = ids if jnp.dtype(ids.dtype).itemsize > 4 else ids.astype(jnp.int32)
    return (wide >= 0) & (wide < num_experts)


def load_of_slots(
    slots: Int[Array, "... k"],
    phy2log: Int32[Array, " R"],
    num_experts: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, " E"]:
    """`load_of_ids` of physical ids: slots of the layer's plan, where routing was recorded late.

    Example:
        >>> load_of_slots(jnp.array([[0, 2], [3, 1]]), jnp.array([0, 1, 0, 2]), 3).tolist()
        [2, 1, 1]
    """
    counts = load_of_ids(slots, phy2log.shape[0], mask=mask, axis_name=axis_name)
    return load_of_counts(counts, phy2log, num_experts)


def load_of_counts(
    counts: Num[Array, "*L R"],
    phy2log: Int32[Array, "*L R"],
    num_experts: int,
    *,
    axis_name: AxisName | None = None,
) -> Num[Array, "*L E"]:
    """Logical loads from what every slot was sent: sums over the slots of an expert.

    Args:
        counts: Tokens of every slot, of one layer or of several.
        phy2log: The expert in every slot, of the same shape.
        num_experts: E.
        axis_name: Mesh axes to sum over, inside `jax.shard_map`.

    Returns:
        Loads, in the dtype of counts, or 32 bits where that has less.

    Raises:
        ValueError: Shapes differ.

    Example:
        >>> load_of_counts(jnp.array([5, 3, 2, 1]), jnp.array([0, 1, 0, 2]), 3).tolist()
        [7, 3, 1]
    """
    num_experts = as_count("num_experts", num_experts)
    if jnp.dtype(counts.dtype).itemsize < 4:
        floats = jnp.issubdtype(counts.dtype, jnp.floating)
        counts = counts.astype(jnp.float32 if floats else jnp.int32)
    if counts.shape != phy2log.shape:
        raise ValueError(f"counts have the shape {counts.shape}, but phy2log {phy2log.shape}")
    add = lambda x, to: jnp.zeros(num_experts, x.dtype).at[to].add(x)  # noqa: E731
    add_all = jnp.vectorize(add, signature="(r),(r)->(e)")
    load = under_auto(add_all, PartitionSpec(*spec_of(counts)[:-1]), counts, phy2log)
    return load if axis_name is None else lax.psum(load, axis_name)


class LoadHistory(NamedTuple):
    """The loads of the last windows, to be carried in the state of a model.

    Attributes:
        windows: Completed windows, oldest first; zeros, which count for nothing in a plan, where
            there are none yet. What `rebalance_experts` takes.
        current: The window that is being counted.
        rest: What the sums in `current` lack for rounding.
        steps: How many steps `current` has.
    """

    windows: Float[Array, "T L E"]
    current: Float[Array, "L E"]
    rest: Float[Array, "L E"]
    steps: Int32[Array, ""]


def history(num_windows: int, num_layers: int, num_experts: int) -> LoadHistory:
    """A history without loads: T windows of L layers and E experts."""
    num_windows = as_count("num_windows", num_windows)
    shape = as_count("num_layers", num_layers), as_count("num_experts", num_experts)
    windows = jnp.zeros((num_windows, *shape), jnp.float32)
    # Arrays of their own, so that a caller can donate all of them.
    current, rest = (jnp.zeros(shape, jnp.float32) for _ in range(2))
    return LoadHistory(windows, current, rest, jnp.zeros((), jnp.int32))


def recorded(past: LoadHistory, load: Num[Array, "L E"], steps_per_window: int = 1) -> LoadHistory:
    """The history after one more step; a pure update, inside `jit` or `scan`.

    Sums neither overflow nor stop growing: they are float32 with what rounding lost carried beside
    them, and right to a part in 2^24 however many steps a window has.

    Args:
        past: The history so far.
        load: Loads of this step, float32 or int32.
        steps_per_window: After so many steps a window is complete, and the oldest is forgotten.

    Raises:
        ValueError: The load is of another shape, or steps_per_window is less than 1.

    Example:
        >>> past = history(2, 1, 3)
        >>> for step in range(4):
        ...     past = recorded(past, jnp.array([[step, 1, 0]]), steps_per_window=2)
        >>> past.windows.tolist()
        [[[1.0, 2.0, 0.0]], [[5.0, 2.0, 0.0]]]
    """
    steps_per_window = as_count("steps_per_window", steps_per_window)
    if load.shape != past.current.shape:
        raise ValueError(f"load has the shape {load.shape}, the history's {past.current.shape}")
    return _recorded(past, load, steps_per_window=steps_per_window)


@partial(jax.jit, static_argnames="steps_per_window")
def _recorded(past: LoadHistory, load: Num[Array, "L E"], *, steps_per_window: int) -> LoadHistory:
    addend = load.astype(jnp.float32) + past.rest
    total = past.current + addend
    # Knuth's two-sum: what `total` lost of either operand.
    gained = total - past.current
    rest = (past.current - (total - gained)) + (addend - gained)
    steps = past.steps + 1
    complete = steps >= steps_per_window
    windows = jnp.concatenate([past.windows[1:], total[None]])
    return LoadHistory(
        jnp.where(complete, windows, past.windows),
        jnp.where(complete, 0, total),
        jnp.where(complete, 0, rest),
        jnp.where(complete, 0, steps),
    )
