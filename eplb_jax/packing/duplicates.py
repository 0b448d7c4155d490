"""Keeping items with one label in distinct packs: replicas of one expert on distinct GPUs."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import LOAD_BITS, first_equal, fixed_point


def repeats_in(label: Int32[Array, "m c *K"]) -> Int32[Array, "*K"]:
    """How many pairs of items in one pack share a label."""
    capacity = label.shape[1]
    count = jnp.zeros(label.shape[2:], jnp.int32)
    for shift in range(1, capacity):
        again = label[:, shift:] == label[:, :-shift]
        count += jnp.sum(again, axis=(0, 1), dtype=jnp.int32)
    return count


class _Slots(NamedTuple):
    """Carry of `separate`: the item in every slot, its label and its weight."""

    contents: Int32[Array, "m c"]
    label: Int32[Array, "m c"]
    value: Int32[Array, "m c"]


def separate(
    contents: Int32[Array, "m c"],
    weight: Float[Array, " n"],
    label: Int32[Array, " n"],
    steps: int,
) -> Int32[Array, "m c"]:
    """Exchange items until no pack holds two of one label, adding as little load as possible.

    Each step takes one repeated item and exchanges it for that item of another pack which
    leaves the heavier of both packs lightest, among those that bring about no new repeat. As
    many steps as there are items beyond the first of their label settle every layer that such
    exchanges can settle. O(n c) a step; packings without repeats are left as they are.
    """
    value = fixed_point(weight, contents.shape[1], LOAD_BITS)[contents]
    start = _Slots(contents, label[contents], value)
    return lax.fori_loop(0, steps, _separate_one, start).contents


def _separate_one(i: Array | int, slots: _Slots) -> _Slots:
    _, label, value = slots
    num_packs, capacity = label.shape
    earlier = np.tri(capacity, k=-1, dtype=bool)
    repeated = jnp.any((label[:, :, None] == label[:, None, :]) & earlier, axis=2).ravel()
    # Take turns, lest one repeat that cannot be settled holds up the others.
    number = jnp.cumsum(repeated, dtype=jnp.int32)
    turn = jnp.asarray(i, jnp.int32) % jnp.maximum(number[-1], 1) + 1
    one = first_equal(jnp.where(repeated, number, 0), turn)
    pack = one // capacity

    holds_label = jnp.any(label == label.ravel()[one], axis=1, keepdims=True)
    known_to_pack = jnp.any(label[:, :, None] == label[pack], axis=2)
    loads = jnp.sum(value, axis=1, dtype=jnp.int32)
    never = jnp.iinfo(jnp.int32).max
    moved = value.ravel()[one] - value
    heavier = jnp.maximum(loads[pack] - moved, loads[:, None] + moved)
    cost = jnp.where(holds_label | known_to_pack, never, heavier).ravel()
    other = first_equal(cost, jnp.min(cost))
    go = (number[-1] > 0) & (jnp.min(cost) < never)

    slot = jnp.arange(num_packs * capacity, dtype=jnp.int32)

    def exchange(x: Array) -> Array:
        flat = x.ravel()
        after = jnp.where(slot == one, flat[other], jnp.where(slot == other, flat[one], flat))
        return jnp.where(go, after, flat).reshape(x.shape)

    return _Slots(*(exchange(x) for x in slots))
