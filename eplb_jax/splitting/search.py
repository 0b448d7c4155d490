"""Plans made for a flexible split.

A walk from a given plan. In every window the tightest set of GPUs is the one whose experts cannot
leave it and that is the most loaded for its size. A step prices every expert by the tightest sets
that hold all of its replicas, lists the swaps of slots and the changes of slots to other experts
that take the most from these sets, tries the first ones on all sets in the family, and makes the
best if the sum of squares of excesses, over windows, decreases.

Up to 8 GPUs the family is all sets, and the sum is exact. With more, it is small sets and those
that were tight in plans so far; every generation of steps begins with splits of the best plan,
which add their tight sets, and ends with a check by such splits.

Sums over sets are of whole numbers and do not depend on the order of additions. Splits are of
floats: with more than 8 GPUs a plan may depend, between equals, on the layers planned with it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.splitting.sets import all_sets, experts_on_gpus, small_sets, tight_sets
from eplb_jax.splitting.shares import split_of_layer
from eplb_jax.splitting.steps import (
    Layer,
    Walk,
    begin,
    cost_of,
    layer_of,
    peak_of,
    step,
    with_scale,
)

_FEW_GPUS = 8
"""Number of GPUs up to which all sets are in the family."""

_STEPS, _PATIENCE = 160, 12
"""Maximum number of steps with all sets, and of steps in a row without a better plan."""

_GENERATIONS, _STEPS_OF_ONE = 8, 10
"""With more GPUs: generations, and steps of each."""

_MEMORY, _TIGHT = 4, 2
"""Generations whose tight sets are kept, and number of these sets of every window."""

_PAIRS_UP_TO = 24
"""Number of GPUs up to which all pairs of them are in the family."""

_TRIED = 8
"""Number of swaps and changes that are tried in a step there; with all sets, the best of every slot
are."""

_FIRST_SPLIT, _SPLIT_STEPS = 48, 24
"""Steps of the first split, and of those between generations, which begin with the last shares."""

_OF_A_CHANGE = 0.5
"""Share of a slot to begin with whose expert has changed."""


class _State(NamedTuple):
    """The best plan, its cost and shares, and sets that were tight in plans so far."""

    best: Int32[Array, " R"]
    cost: Int32[Array, ""]
    shares: Float[Array, "T R"]
    sets: Bool[Array, "memory T*K G"]


def search(
    windows: Float[Array, "L T E"],
    start: Int32[Array, "L R"],
    slack: Float[Array, ""],
    max_moves: Int32[Array, ""],
    *,
    num_gpus: int,
    node: tuple[int, ...] | None,
) -> Int32[Array, "L R"]:
    """The expert in every slot, never worse than `start` in these windows under a flexible split.

    Args:
        windows: Loads to fit, each times the square root of its weight.
        start: The plan to begin with, from which moves are counted.
        slack: Imbalance that is good enough.
        max_moves: Per layer, limit of moves.
        num_gpus: G; each has R / G slots.
        node: The node of every GPU, which experts keep to; None: they need not.
    """
    few = num_gpus <= _FEW_GPUS
    walk = _among_all_sets if few else _among_tight_sets
    walk = partial(walk, num_gpus=num_gpus, node=node)
    return jax.vmap(walk, (0, 0, None, None))(windows, start, slack, max_moves)


def _among_all_sets(
    windows: Float[Array, "T E"],
    start: Int32[Array, " R"],
    slack: Float[Array, ""],
    max_moves: Int32[Array, ""],
    *,
    num_gpus: int,
    node: tuple[int, ...] | None,
) -> Int32[Array, " R"]:
    sets = jnp.asarray(all_sets(num_gpus))
    layer = layer_of(windows, start, slack, max_moves, num_gpus)
    layer = with_scale(layer, peak_of(begin(layer, start, sets).inside, sets))
    first = begin(layer, start, sets)

    def goes_on(state: tuple[Array, Walk]) -> Bool[Array, ""]:
        number, walk = state
        return (number < _STEPS) & (walk.failed < _PATIENCE) & (walk.cost > 0)

    def go(state: tuple[Array, Walk]) -> tuple[Array, Walk]:
        number, walk = state
        return number + 1, step(layer, walk, sets, number, node, 2 * start.size)

    return lax.while_loop(goes_on, go, (jnp.zeros((), jnp.int32), first))[1].phy2log


def _among_tight_sets(
    windows: Float[Array, "T E"],
    start: Int32[Array, " R"],
    slack: Float[Array, ""],
    max_moves: Int32[Array, ""],
    *,
    num_gpus: int,
    node: tuple[int, ...] | None,
) -> Int32[Array, " R"]:
    small = jnp.asarray(small_sets(num_gpus, 2 if num_gpus <= _PAIRS_UP_TO else 1))
    layer = layer_of(windows, start, slack, max_moves, num_gpus)
    gpu_load, shares = _split(layer, start, None, num_gpus, _FIRST_SPLIT)
    layer = with_scale(layer, jnp.max(gpu_load, axis=1))
    tight = tight_sets(layer.units, start, gpu_load, _TIGHT).reshape(-1, num_gpus)
    cost = cost_of(layer, jnp.max(gpu_load, axis=1))
    state = _State(start, cost, shares, jnp.stack([tight] * _MEMORY))

    def generation(number: Array | int, state: _State) -> _State:
        sets = jnp.concatenate([small, state.sets.reshape(-1, num_gpus)])

        def go(i: Array, walk: Walk) -> Walk:
            return step(layer, walk, sets, number * _STEPS_OF_ONE + i, node, _TRIED)

        last = lax.fori_loop(0, _STEPS_OF_ONE, go, begin(layer, state.best, sets)).phy2log
        shares = jnp.where(last == state.best, state.shares, _OF_A_CHANGE)
        gpu_load, shares = _split(layer, last, shares, num_gpus, _SPLIT_STEPS)
        cost = cost_of(layer, jnp.max(gpu_load, axis=1))
        tight = tight_sets(layer.units, last, gpu_load, _TIGHT).reshape(1, -1, num_gpus)
        better = cost < state.cost
        return _State(
            jnp.where(better, last, state.best),
            jnp.where(better, cost, state.cost),
            jnp.where(better, shares, state.shares),
            jnp.concatenate([state.sets[1:], tight]),
        )

    return lax.fori_loop(0, _GENERATIONS, generation, state).best


def _split(
    layer: Layer,
    phy2log: Int32[Array, " R"],
    start: Float[Array, "T R"] | None,
    num_gpus: int,
    steps: int,
) -> tuple[Float[Array, "T G"], Float[Array, "T R"]]:
    """The loads of GPUs under a good split of every window, and its shares."""
    num_experts = layer.units.shape[1]
    count = jnp.sum(experts_on_gpus(phy2log, num_experts, num_gpus), axis=1, dtype=jnp.int32)
    options = {"num_gpus": num_gpus, "steps": steps}

    def of_window(load: Float[Array, " E"], start: Float[Array, " R"] | None) -> tuple:
        share = split_of_layer(load, phy2log, count, start, **options)
        return jnp.sum((share * load[phy2log]).reshape(num_gpus, -1), axis=1), share

    return jax.vmap(of_window)(layer.units, start)
