"""A walk from one plan to another: what it looks for, what it has found, and what a step gains."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import first_equal, unfused
from eplb_jax.transition.layer import Layer, Plan, load_times, relative

BITS = 14
"""Bits of the largest excess when a walk begins."""

MOST = 23170
"""Largest excess whose square, twice, fits in an int32; more counts as this."""


class Goal(NamedTuple):
    """When a walk ends, and what it may use.

    Attributes:
        target: Imbalance at which the walk ends.
        max_moves: Limit of moves from the plan in place.
        penalty: Imbalance that a move must gain.
    """

    target: Float[Array, "*L"]
    max_moves: Int32[Array, "*L"]
    penalty: Float[Array, ""]


class Best(NamedTuple):
    """The best plan so far."""

    expert: Int32[Array, "c m"]
    gpu: Int32[Array, " m"]
    cost: Float[Array, ""]
    moves: Int32[Array, ""]


class Walk(NamedTuple):
    """The state of a layer between rounds."""

    plan: Plan
    best: Best
    failed: Int32[Array, ""]  # rounds in a row that changed nothing
    complete: Float[Array, ""]  # share of the excess of its pair that a swap must remove
    rate: Float[Array, ""]  # gain per move of the last change of experts


def cost_of(imbalance: Array, moves: Array, goal: Goal) -> Float[Array, "*k"]:
    """The imbalance or the target if more, + penalty * moves; infinite past the limit."""
    cost = jnp.maximum(imbalance, goal.target) + product(goal.penalty, moves)
    return jnp.where(moves <= goal.max_moves, cost, jnp.inf)


def above_target(layer: Layer, plan: Plan, goal: Goal) -> Float[Array, "m T"]:
    """The time of every GPU less the target."""
    return load_times(layer, plan) - unfused(layer.level * (1 + goal.target))[None]


def excess_of(layer: Layer, plan: Plan, goal: Goal) -> Int32[Array, "m T"]:
    """The same as integers, scaled for squares."""
    return (above_target(layer, plan, goal) * layer.scale).astype(jnp.int32)


def squared(excess: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """The square of an excess, below 2^30; below the target, a sixteenth of the square."""
    bounded = jnp.clip(jnp.maximum(excess, excess >> 2), -MOST, MOST)
    return bounded * bounded


def scaled(load: Int32[Array, "..."], factor: Array) -> Int32[Array, "..."]:
    """Loads times a factor, as integers."""
    return (load.astype(jnp.float32) * factor).astype(jnp.int32)


def product(x: Array, y: Array) -> Float[Array, "..."]:
    """The product to 23 bits, which no compiler can fuse with an addition."""
    return lax.reduce_precision(x.astype(jnp.float32) * y.astype(jnp.float32), 8, 22)


def sum_over(count: int, term: Callable[[int], Array]) -> Array:
    """The sum of terms, one after the other."""
    return reduce(jnp.add, [term(i) for i in range(count)])


def per_move(gain: Float[Array, "*n"], moves: Int32[Array, "*n"]) -> Float[Array, "*n"]:
    """The gain of each move; without a move, twice the gain."""
    return gain * jnp.where(moves > 1, 0.5, jnp.where(moves == 1, 1.0, 2.0))


def first_k(rate: Float[Array, " k"], chosen: Bool[Array, " k"]) -> Bool[Array, "k k"]:
    """Which are chosen among the first 1, 2, ... by descending rate."""
    index = jnp.arange(rate.shape[0], dtype=jnp.int32)
    own, other = rate[:, None], rate[None]
    before = chosen[None] & ((other > own) | ((other == own) & (index[None] < index[:, None])))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    return chosen[None] & (place[None] <= index[:, None])


def best_prefix(
    best: Best,
    layer: Layer,
    goal: Goal,
    peak: Float[Array, "T k"],
    moves: Int32[Array, " k"],
    gpu: Int32[Array, " m"],
    plan_of: Callable[[Array], Array],
) -> Best:
    """The best plan so far or the best within a round, whose k plans have these maximum times."""
    cost = cost_of(relative(layer, peak), moves, goal)
    least = jnp.min(cost)
    one = first_equal(cost, least)
    spent = moves[one]
    better = (least < best.cost) | ((least == best.cost) & (spent < best.moves))
    new = Best(plan_of(one), gpu, least, spent)
    return jax.tree.map(lambda x, y: jnp.where(better, x, y), new, best)
