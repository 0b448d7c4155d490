"""What makes one packing better than another: numbers compared in turn, smaller is better."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Num

from eplb_jax.arrays import unfused

Objective = Callable[[Num[Array, "m *K"]], tuple[Num[Array, "*K"], ...]]
"""From the loads of the packs to the numbers by which candidates are compared."""


def spread(loads: Num[Array, "m *K"]) -> tuple[Num[Array, "*K"], ...]:
    """The maximum load minus the minimum load."""
    return (jnp.max(loads, axis=0) - jnp.min(loads, axis=0),)


def peak(loads: Num[Array, "m *K"]) -> tuple[Num[Array, "*K"], ...]:
    """The maximum load, then the sum of squared loads."""
    squares = unfused(jnp.square(loads.astype(jnp.float32)))
    return jnp.max(loads, axis=0), jnp.sum(squares, axis=0)


def best(scores: tuple[Num[Array, " K"], ...], keep: int) -> Int32[Array, " keep"]:
    """The `keep` best candidates, best first; the earlier one among equals."""
    (count,) = scores[0].shape
    index = jnp.arange(count, dtype=jnp.int32)
    return lax.sort((*scores, index), num_keys=len(scores), is_stable=True)[-1][:keep]


def better(new: tuple[Num[Array, ""], ...], old: tuple[Num[Array, ""], ...]) -> Array:
    """Whether `new` comes strictly before `old`."""
    result = jnp.zeros((), bool)
    for x, y in zip(reversed(new), reversed(old), strict=True):
        result = (x < y) | ((x == y) & result)
    return result
