"""Sorts of many lanes at once.

The candidates of a layer are trailing axes, called lanes, so every row of an array is one wide
vector: on XLA:CPU this is 4 to 6 times faster than the same function under `vmap`, which puts the
candidates first. One int32 holds a value in its high bits and an index in its low ones, so that a
single integer minimum or sort finds both, with ties to the lowest index.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import index_bits, pick, rows

MAX_ITEMS = 1 << 15
"""Largest number of items: two indices must fit in one int32."""

FEW_LANES = 256
"""Below this many lanes use `lax.sort`: at most 2x slower than the network, which takes half a
second to compile."""


def descending_order(value: Float[Array, "n *K"]) -> Int32[Array, "n *K"]:
    """The rows of every lane by descending value, lowest row first among equals.

    Values are nonnegative and are compared to 31 - log2(n) significant bits, which is what
    noisy sort keys need; an exact order takes `jnp.argsort`.
    """
    low = (1 << index_bits(value.shape[0])) - 1
    flipped = ~lax.bitcast_convert_type(value, jnp.int32)
    return sort_lanes((flipped & ~low) | rows(value.shape[0], value)) & low


def exact_descending_order(value: Float[Array, "n *K"]) -> Int32[Array, "n *K"]:
    """`descending_order` by all bits of nonnegative values: in two sorts, by the low ones first."""
    n = value.shape[0]
    bits = index_bits(n)
    mask = (1 << bits) - 1
    flipped = ~lax.bitcast_convert_type(value, jnp.int32) & 0x7FFFFFFF
    by_low = sort_lanes(((flipped << bits) & 0x7FFFFFFF) | rows(n, value)) & mask
    high = pick(flipped >> (31 - bits), by_low)
    return pick(by_low, sort_lanes((high << bits) | rows(n, value)) & mask)


def inverse(permutation: Int32[Array, "n *K"]) -> Int32[Array, "n *K"]:
    """The row of every value 0..n-1 in each lane."""
    n = permutation.shape[0]
    bits = index_bits(n)
    return sort_lanes((permutation << bits) | rows(n, permutation)) & ((1 << bits) - 1)


def sort_lanes(keys: Int32[Array, "n *K"]) -> Int32[Array, "n *K"]:
    """Sort every lane in ascending order along the first axis.

    A bitonic network for any n: every compare-exchange runs over whole rows of lanes. Merges
    mirror their second half, so that all comparisons point the same way and rows past the
    end, which would hold infinity, can be left out. O(log(n)^2) passes.

    References:
        K. E. Batcher, "Sorting networks and their applications", AFIPS 1968.
    """
    if keys.size < FEW_LANES * keys.shape[0]:
        return jnp.moveaxis(lax.sort(jnp.moveaxis(keys, 0, -1)), -1, 0)
    block = 2
    while block < 2 * keys.shape[0]:
        keys = _compare(keys, block, mirrored=True)
        distance = block // 4
        while distance:
            keys = _compare(keys, 2 * distance, mirrored=False)
            distance //= 2
        block *= 2
    return keys


def _compare(keys: Int32[Array, "n *K"], block: int, *, mirrored: bool) -> Int32[Array, "n *K"]:
    """One compare-exchange of the halves of every block of rows; the last may be cut short."""
    half = block // 2
    whole = keys.shape[0] - keys.shape[0] % block
    parts = []
    if whole:
        pairs = keys[:whole].reshape(-1, 2, half, *keys.shape[1:])
        low, high = pairs[:, 0], pairs[:, 1]
        if mirrored:
            high = high[:, ::-1]
        low, high = jnp.minimum(low, high), jnp.maximum(low, high)
        if mirrored:
            high = high[:, ::-1]
        parts.append(jnp.stack([low, high], axis=1).reshape(whole, *keys.shape[1:]))
    rest = keys[whole:]
    count = rest.shape[0]
    extra = count - half  # rows of the cut block that have a partner
    if extra <= 0:
        parts.append(rest)
    elif mirrored:
        low, high = rest[half - extra : half], rest[half:][::-1]
        parts += [
            rest[: half - extra],
            jnp.minimum(low, high),
            jnp.maximum(low, high)[::-1],
        ]
    else:
        low, high = rest[:extra], rest[half:]
        parts += [jnp.minimum(low, high), rest[extra:half], jnp.maximum(low, high)]
    return jnp.concatenate(parts)
