"""Keeping items with one label in distinct packs: replicas of one expert on distinct GPUs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from eplb_jax.arrays import first_equal


def count_duplicates(label: Int32[Array, "m c *K"]) -> Int32[Array, "*K"]:
    """How many pairs of items in one pack share a label."""
    same = label[:, :, None] == label[:, None]
    itself = label.shape[0] * label.shape[1]
    return (jnp.sum(same, axis=(0, 1, 2), dtype=jnp.int32) - itself) // 2


def bound_labels(label: Int32[Array, " n"], most: int) -> Int32[Array, " n"]:
    """Labels of the same items, each on at most `most` of them: the first ones, the next, ..."""
    order = jnp.argsort(label, stable=True).astype(jnp.int32)
    index = jnp.arange(label.shape[0], dtype=jnp.int32)
    ascending = label[order]
    starts = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]])
    start = lax.cummax(jnp.where(starts, index, 0))
    bounded = order[start] + label.shape[0] * ((index - start) // most)
    return jnp.zeros_like(label).at[order].set(bounded)


class _Contents(NamedTuple):
    """Carry of `separate`: the item in every position, its label and its weight."""

    contents: Int32[Array, "m c"]
    label: Int32[Array, "m c"]
    value: Int32[Array, "m c"]


def separate(
    contents: Int32[Array, "m c"],
    units: Int32[Array, " n"],
    label: Int32[Array, " n"],
    steps: int,
) -> Int32[Array, "m c"]:
    """Exchange items until no pack holds two of one label, adding as little load as possible.

    Each step takes one duplicate and exchanges it for the item of another pack that gives the
    least maximum of the two loads, among those that create no new duplicate. As many steps as
    there are items beyond the first of their label settle every layer that such exchanges can
    settle. O(n c) a step; packings without duplicates are returned as they are.
    """
    start = _Contents(contents, label[contents], units[contents])
    return lax.fori_loop(0, steps, _separate_one, start).contents


def _separate_one(i: Array | int, packs: _Contents) -> _Contents:
    _, label, value = packs
    num_packs, capacity = label.shape
    position = jnp.arange(capacity, dtype=jnp.int32)
    same = label[:, :, None] == label[:, None, :]
    duplicate = jnp.any(same & (position[None] < position[:, None])[None], axis=2).ravel()
    # Duplicates take turns, so one that cannot be removed does not hold up the others.
    number = jnp.cumsum(duplicate, dtype=jnp.int32)
    turn = jnp.asarray(i, jnp.int32) % jnp.maximum(number[-1], 1) + 1
    one = first_equal(jnp.where(duplicate, number, 0), turn)
    pack = one // capacity

    holds_label = jnp.any(label == label.ravel()[one], axis=1, keepdims=True)
    known_to_pack = jnp.any(label[:, :, None] == label[pack][None, None], axis=2)
    loads = jnp.sum(value, axis=1, dtype=jnp.int32)
    never = jnp.iinfo(jnp.int32).max
    moved = value.ravel()[one] - value
    larger = jnp.maximum(loads[pack] - moved, loads[:, None] + moved)
    cost = jnp.where(holds_label | known_to_pack, never, larger).ravel()
    other = first_equal(cost, jnp.min(cost))
    good = (number[-1] > 0) & (jnp.min(cost) < never)

    slot = jnp.arange(num_packs * capacity, dtype=jnp.int32)

    def exchange(x: Array) -> Array:
        flat = x.ravel()
        after = jnp.where(slot == one, flat[other], jnp.where(slot == other, flat[one], flat))
        return jnp.where(good, after, flat).reshape(x.shape)

    return _Contents(*(exchange(x) for x in packs))
