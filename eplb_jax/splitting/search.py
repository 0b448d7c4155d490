"""Plans made for a flexible split.

A walk from a given plan. In every window the tightest set of GPUs is the one whose experts cannot
leave it and that is the most loaded for its size. A step prices every expert by the tightest sets
that hold all of its replicas, lists the swaps of slots and the changes of slots to other experts
that take the most from these sets, tries the first ones on all sets in the family, and makes the
best if the sum of squares of excesses, over windows, decreases.

Up to 8 GPUs the family is all sets, and the sum is exact. With more, it is small sets and those
that were tight in plans so far; every generation of steps begins with splits of the best plan,
which add their tight sets, and ends with a check by such splits.

All sums are of whole numbers: plans do not depend on the order of additions.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import (
    along,
    first_equal,
    fixed_point,
    index_bits,
    normalise,
    take_rows,
    unfused,
)
from eplb_jax.splitting.sets import (
    all_sets,
    experts_on_gpus,
    loads_inside,
    replicas_outside,
    small_sets,
    tight_sets,
)
from eplb_jax.splitting.shares import split_of_layer

_FEW_GPUS = 8
"""Number of GPUs up to which all sets are in the family."""

_STEPS, _PATIENCE = 160, 12
"""Maximum number of steps with all sets, and of steps in a row without a better plan."""

_GENERATIONS, _STEPS_OF_ONE = 8, 10
"""With more GPUs: generations, and steps of each."""

_MEMORY, _TIGHT = 4, 4
"""Generations whose tight sets are kept, and number of these sets of every window."""

_PAIRS_UP_TO = 24
"""Number of GPUs up to which all pairs of them are in the family."""

_TRIED = 16
"""Number of swaps and changes that are tried in a step there; with all sets, the best of every slot
are."""

_SPLIT_STEPS = 48
"""Steps of the splits between generations."""

_NEVER = 1 << 30
"""The gain of what is not allowed."""

_LOAD_BITS = 22
"""Bits of the load of a window: sums are exact in float32."""


class _Layer(NamedTuple):
    """What does not change during a walk.

    Attributes:
        units: Loads as whole numbers.
        level: The GPU load of every window that is good enough, in these units.
        scale: Factor of an excess over the level, which weighs the window.
        away: Whether a GPU lacks an expert in the plan in place, so that it would move there.
        max_moves: Limit of moves from the plan in place.
    """

    units: Float[Array, "T E"]
    level: Float[Array, " T"]
    scale: Float[Array, " T"]
    away: Int32[Array, "E G"]
    max_moves: Int32[Array, ""]


class _Walk(NamedTuple):
    """The plan between steps.

    Attributes:
        phy2log: The expert in every slot.
        held: Replicas of every expert on every GPU.
        outside: Replicas of every expert outside of every set.
        inside: The load that cannot leave each set.
        moves: Slots with an expert that their GPU lacks in the plan in place.
        cost: The sum of squares of excesses.
        failed: Steps in a row that did not help.
    """

    phy2log: Int32[Array, " R"]
    held: Int32[Array, "E G"]
    outside: Float[Array, "E M"]
    inside: Float[Array, "T M"]
    moves: Int32[Array, ""]
    cost: Int32[Array, ""]
    failed: Int32[Array, ""]


class _State(NamedTuple):
    """The best plan, its cost, and sets that were tight in plans so far."""

    best: Int32[Array, " R"]
    cost: Int32[Array, ""]
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
    layer = _layer(windows, start, slack, max_moves, num_gpus)
    layer = _with_scale(layer, _peak(_begin(layer, start, sets).inside, sets))
    first = _begin(layer, start, sets)

    def goes_on(state: tuple[Array, _Walk]) -> Bool[Array, ""]:
        step, walk = state
        return (step < _STEPS) & (walk.failed < _PATIENCE) & (walk.cost > 0)

    def go(state: tuple[Array, _Walk]) -> tuple[Array, _Walk]:
        step, walk = state
        return step + 1, _step(layer, walk, sets, step, node, 2 * start.size)

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
    layer = _layer(windows, start, slack, max_moves, num_gpus)
    gpu_load = _split(layer, start, num_gpus)
    layer = _with_scale(layer, jnp.max(gpu_load, axis=1))
    tight = tight_sets(layer.units, start, gpu_load, _TIGHT).reshape(-1, num_gpus)
    cost = _cost(layer, jnp.max(gpu_load, axis=1))
    state = _State(start, cost, jnp.stack([tight] * _MEMORY))

    def generation(number: Array | int, state: _State) -> _State:
        sets = jnp.concatenate([small, state.sets.reshape(-1, num_gpus)])

        def go(step: Array, walk: _Walk) -> _Walk:
            return _step(layer, walk, sets, number * _STEPS_OF_ONE + step, node, _TRIED)

        last = lax.fori_loop(0, _STEPS_OF_ONE, go, _begin(layer, state.best, sets)).phy2log
        gpu_load = _split(layer, last, num_gpus)
        cost = _cost(layer, jnp.max(gpu_load, axis=1))
        tight = tight_sets(layer.units, last, gpu_load, _TIGHT).reshape(1, -1, num_gpus)
        better = cost < state.cost
        return _State(
            jnp.where(better, last, state.best),
            jnp.where(better, cost, state.cost),
            jnp.concatenate([state.sets[1:], tight]),
        )

    return lax.fori_loop(0, _GENERATIONS, generation, state).best


def _layer(
    windows: Float[Array, "T E"],
    start: Int32[Array, " R"],
    slack: Float[Array, ""],
    max_moves: Int32[Array, ""],
    num_gpus: int,
) -> _Layer:
    """The layer with excesses that are not scaled yet."""
    units = fixed_point(normalise(windows, 1), windows.shape[1], _LOAD_BITS)
    total = jnp.sum(units, axis=1, dtype=jnp.int32).astype(jnp.float32)
    level = jnp.maximum(total, 1) / num_gpus
    # Windows differ by their weights: largest load to largest load, as sums depend on their order.
    most = jnp.maximum(jnp.max(units, axis=1), 1).astype(jnp.float32)
    away = (experts_on_gpus(start, windows.shape[1], num_gpus) == 0).astype(jnp.int32)
    weight = jnp.max(windows, axis=1) / most
    return _Layer(units.astype(jnp.float32), level * (1 + slack), weight, away, max_moves)


def _with_scale(layer: _Layer, peak: Float[Array, " T"]) -> _Layer:
    """The same, scaled so that squares of excesses of all windows add up to an int32."""
    most = float(int((2**31 / peak.shape[0]) ** 0.5) - 1)
    largest = jnp.max((unfused(peak) - layer.level) * layer.scale)
    return layer._replace(scale=layer.scale * (most / 2 / jnp.maximum(largest, 1e-30)))


def _excess(layer: _Layer, peak: Float[Array, "*K T"]) -> Int32[Array, "*K T"]:
    """How far maximum loads are above the level, in whole numbers."""
    most = int((2**31 / peak.shape[-1]) ** 0.5) - 1
    level, scale = (x.reshape((1,) * (peak.ndim - 1) + (-1,)) for x in (layer.level, layer.scale))
    above = (unfused(peak) - level) * scale
    return jnp.clip(above, 0, most).astype(jnp.int32)


def _cost(layer: _Layer, peak: Float[Array, "*K T"]) -> Int32[Array, "*K"]:
    excess = _excess(layer, peak)
    return jnp.sum(excess * excess, axis=-1, dtype=jnp.int32)


def _begin(layer: _Layer, phy2log: Int32[Array, " R"], sets: Bool[Array, "M G"]) -> _Walk:
    count = experts_on_gpus(phy2log, layer.units.shape[1], sets.shape[1])
    outside = replicas_outside(count, sets)
    inside = loads_inside(layer.units, outside)
    cost = _cost(layer, _peak(inside, sets))
    moves = jnp.sum(count * layer.away, dtype=jnp.int32)
    return _Walk(phy2log, count, outside, inside, moves, cost, jnp.zeros((), jnp.int32))


def _sizes(sets: Bool[Array, "M G"]) -> Float[Array, " M"]:
    return jnp.sum(sets, axis=1, dtype=jnp.int32).astype(jnp.float32)


def _peak(inside: Float[Array, "*K T M"], sets: Bool[Array, "M G"]) -> Float[Array, "*K T"]:
    """The smallest possible maximum GPU load, as far as these sets say."""
    size = _sizes(sets).reshape((1,) * (inside.ndim - 1) + (-1,))
    return jnp.max(inside / size, axis=-1)


def _split(layer: _Layer, phy2log: Int32[Array, " R"], num_gpus: int) -> Float[Array, "T G"]:
    """The loads of GPUs under a good split of every window."""
    num_experts = layer.units.shape[1]
    count = jnp.sum(experts_on_gpus(phy2log, num_experts, num_gpus), axis=1, dtype=jnp.int32)

    def of_window(load: Float[Array, " E"]) -> Float[Array, " G"]:
        share = split_of_layer(load, phy2log, count, num_gpus, _SPLIT_STEPS)
        return jnp.sum((share * load[phy2log]).reshape(num_gpus, -1), axis=1)

    return jax.vmap(of_window)(layer.units)


def _step(
    layer: _Layer,
    walk: _Walk,
    sets: Bool[Array, "M G"],
    number: Array | int,
    node: tuple[int, ...] | None,
    tried: int,
) -> _Walk:
    """One swap or change, if one of those that are tried decreases the cost."""
    phy2log, units, num_gpus = walk.phy2log, layer.units, sets.shape[1]
    capacity = phy2log.size // num_gpus
    slot = jnp.arange(phy2log.size, dtype=jnp.int32)
    gpu = slot // capacity
    held, outside, inside, size = walk.held, walk.outside, walk.inside, _sizes(sets)
    ratio = inside / size[None]
    peak = jnp.max(ratio, axis=1)
    tightest = first_equal(ratio.T, peak)
    tight = take_rows(sets, tightest)  # [T, G]

    # The price of an expert in a window: by how much the square would fall without its load.
    price = _excess(layer, peak).astype(jnp.float32) * layer.scale / take_rows(size, tightest)
    price = price[:, None] * units
    bits = 29 - index_bits(len(units))
    price = (price * (2.0**bits / jnp.maximum(jnp.max(price), 1e-30))).astype(jnp.int32)
    left = along(outside, tightest[None], 1).T  # [T, E]
    stuck = jnp.where(left == 0, price, 0)
    # What each slot adds to the price if it moves to another GPU, or holds nothing.
    own, base = price[:, phy2log], jnp.sum(stuck, axis=0, dtype=jnp.int32)[phy2log]
    gone = (left[:, phy2log] - (~tight[:, gpu]).astype(jnp.float32)) == 0
    own = jnp.where(gone, own, 0)
    moved = jnp.sum(jnp.where(tight[:, None], own[:, :, None], 0), axis=0, dtype=jnp.int32)
    moved = moved - base[:, None]  # [R, G]
    dropped = jnp.sum(own, axis=0, dtype=jnp.int32) - base
    added = -jnp.sum(jnp.where(tight[:, None], 0, stuck[:, :, None]), axis=0, dtype=jnp.int32)

    has = held > 0
    stays, absent = has[phy2log], ~has
    single = jnp.sum(held, axis=1, dtype=jnp.int32)[phy2log] < 2
    if node is not None:
        near = np.array(node)[:, None] == np.array(node)[None]
        stays |= ~jnp.asarray(near)[gpu]
        absent &= (has.astype(jnp.int32) @ jnp.asarray(near.astype(np.int32))) > 0
    moved = jnp.where(stays, _NEVER, moved)
    added = jnp.where(absent, added, _NEVER)  # [E, G]
    # The best slot of a GPU to swap with, and the best expert to add to it.
    partners = moved.reshape(num_gpus, capacity, num_gpus)
    partner = jnp.min(partners, axis=1)  # [GPU of the partner, GPU that it moves to]
    swap = jnp.minimum(moved, _NEVER - 1) + jnp.minimum(partner.T[gpu], _NEVER - 1)  # [R, G]
    swap = jnp.where(stays | (partner.T[gpu] == _NEVER), _NEVER, swap)
    best_added = jnp.min(added, axis=0)
    change = jnp.where(single | (best_added[gpu] == _NEVER), _NEVER, dropped + best_added[gpu])
    best_swap = jnp.min(swap, axis=1)
    gain = jnp.concatenate([best_swap, change])

    row = jnp.arange(gain.size, dtype=jnp.uint32)
    # Eighths of the gain, another part in every step, so that a step without success is no end.
    part = row * np.uint32(2654435761) + jnp.asarray(number).astype(jnp.uint32) * np.uint32(40503)
    noise = ((part >> 13) & 3).astype(jnp.int32)
    noisy = jnp.where(gain == _NEVER, _NEVER, gain - (gain >> 3) * noise)
    chosen = lax.top_k(-noisy, min(gain.size, tried))[1]
    valid, is_swap = gain[chosen] < _NEVER, chosen < slot.size
    first = chosen % slot.size
    out, here = phy2log[first], gpu[first]
    there = first_equal(swap[first].T, best_swap[first])
    beside = first_equal(partners[there, :, here].T, partner[there, here])
    second = jnp.where(is_swap, there * capacity + beside, first)
    new_expert = first_equal(added, best_added)[here]
    into = jnp.where(is_swap, phy2log[second], new_expert)

    there, alone = gpu[second], ~is_swap  # nothing comes back
    away, home = (~sets[:, x].T for x in (here, there))  # [K, M]
    shift = jnp.where(alone[:, None], 0, home.astype(jnp.float32)) - away.astype(jnp.float32)
    out_outside, into_outside = outside[out], outside[into]
    out_gain, into_gain = _now_inside(out_outside, shift), _now_inside(into_outside, -shift)
    by_out, by_into = units[:, out].T[:, :, None], units[:, into].T[:, :, None]  # [K, T, 1]
    after = inside[None] + by_out * out_gain[:, None] + by_into * into_gain[:, None]
    back = jnp.where(alone, 0, layer.away[out, there] - layer.away[into, there])
    moves = walk.moves + layer.away[into, here] - layer.away[out, here] + back
    valid &= moves <= layer.max_moves
    cost = jnp.where(valid, _cost(layer, _peak(after, sets)), np.iinfo(np.int32).max)
    least = jnp.min(cost)
    k = first_equal(cost, least)
    better = least < walk.cost
    one = better.astype(jnp.int32)
    back = jnp.where(alone[k], 0, one)
    x, y = out[k], into[k]
    new = phy2log.at[second[k]].set(jnp.where(alone[k], y, x)).at[first[k]].set(y)
    shift = jnp.where(better, shift[k], 0)
    return _Walk(
        jnp.where(better, new, phy2log),
        held.at[x, here[k]]
        .add(-one)
        .at[x, there[k]]
        .add(back)
        .at[y, here[k]]
        .add(one)
        .at[y, there[k]]
        .add(-back),
        outside.at[x].add(shift).at[y].add(-shift),
        jnp.where(better, after[k], inside),
        jnp.where(better, moves[k], walk.moves),
        jnp.where(better, least, walk.cost),
        jnp.where(better, 0, walk.failed + 1),
    )


def _now_inside(outside: Float[Array, "K M"], change: Float[Array, "K M"]) -> Float[Array, "K M"]:
    """1 where a set now holds all replicas, -1 where it no longer does, else 0."""
    after = (outside + change == 0).astype(jnp.float32)
    return after - (outside == 0).astype(jnp.float32)
