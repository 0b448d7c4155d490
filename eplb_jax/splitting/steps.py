"""Steps of the search of plans for a flexible split: what is carried, and one swap or change."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import (
    first_equal,
    fixed_point,
    index_bits,
    normalise,
    take_rows,
    unfused,
)
from eplb_jax.splitting.sets import experts_on_gpus, loads_inside, replicas_outside

_NEVER, _LIMIT = 2.0**30, 2.0**29
"""The gain of what is not allowed, and what gains that are allowed are below."""

_LOAD_BITS = 22
"""Bits of the load of a window: sums are exact in float32."""


class Layer(NamedTuple):
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


class Walk(NamedTuple):
    """The plan between steps.

    Attributes:
        phy2log: The expert in every slot.
        held: Replicas of every expert on every GPU.
        inside: The load that cannot leave each set.
        moves: Slots with an expert that their GPU lacks in the plan in place.
        cost: The sum of squares of excesses.
        failed: Steps in a row that did not help.
    """

    phy2log: Int32[Array, " R"]
    held: Int32[Array, "E G"]
    inside: Float[Array, "M T"]
    moves: Int32[Array, ""]
    cost: Int32[Array, ""]
    failed: Int32[Array, ""]


def layer_of(
    windows: Float[Array, "T E"],
    start: Int32[Array, " R"],
    slack: Float[Array, ""],
    max_moves: Int32[Array, ""],
    num_gpus: int,
) -> Layer:
    """The layer with excesses that are not scaled yet."""
    units = fixed_point(normalise(windows, 1), windows.shape[1], _LOAD_BITS)
    total = jnp.sum(units, axis=1, dtype=jnp.int32).astype(jnp.float32)
    level = jnp.maximum(total, 1) / num_gpus
    # Windows differ by their weights: largest load to largest load, as sums depend on their order.
    most = jnp.maximum(jnp.max(units, axis=1), 1).astype(jnp.float32)
    away = (experts_on_gpus(start, windows.shape[1], num_gpus) == 0).astype(jnp.int32)
    weight = jnp.max(windows, axis=1) / most
    return Layer(units.astype(jnp.float32), level * (1 + slack), weight, away, max_moves)


def with_scale(layer: Layer, peak: Float[Array, " T"]) -> Layer:
    """The same, scaled so that squares of excesses of all windows add up to an int32."""
    most = float(int((2**31 / peak.shape[0]) ** 0.5) - 1)
    largest = jnp.max((unfused(peak) - layer.level) * layer.scale)
    return layer._replace(scale=layer.scale * (most / 2 / jnp.maximum(largest, 1e-30)))


def _excess(layer: Layer, peak: Float[Array, "T *K"]) -> Int32[Array, "T *K"]:
    """How far maximum loads are above the level, in whole numbers."""
    most = int((2**31 / peak.shape[0]) ** 0.5) - 1
    level, scale = (x.reshape((-1,) + (1,) * (peak.ndim - 1)) for x in (layer.level, layer.scale))
    above = (unfused(peak) - level) * scale
    return jnp.clip(above, 0, most).astype(jnp.int32)


def cost_of(layer: Layer, peak: Float[Array, "T *K"]) -> Int32[Array, "*K"]:
    """The sum of squares of excesses over windows."""
    excess = _excess(layer, peak)
    return jnp.sum(excess * excess, axis=0, dtype=jnp.int32)


def begin(layer: Layer, phy2log: Int32[Array, " R"], sets: Bool[Array, "M G"]) -> Walk:
    """The state of a walk that begins with this plan."""
    count = experts_on_gpus(phy2log, layer.units.shape[1], sets.shape[1])
    inside = loads_inside(layer.units, replicas_outside(count, sets))
    cost = cost_of(layer, peak_of(inside, sets))
    moves = jnp.sum(count * layer.away, dtype=jnp.int32)
    return Walk(phy2log, count, inside, moves, cost, jnp.zeros((), jnp.int32))


def _over_size(sets: Bool[Array, "M G"]) -> Float[Array, " M"]:
    return 1 / jnp.sum(sets, axis=1, dtype=jnp.int32).astype(jnp.float32)


def peak_of(inside: Float[Array, "M *n"], sets: Bool[Array, "M G"]) -> Float[Array, "*n"]:
    """The smallest possible maximum GPU load, as far as these sets say."""
    part = _over_size(sets).reshape((-1,) + (1,) * (inside.ndim - 1))
    return jnp.max(inside * part, axis=0)


def step(
    layer: Layer,
    walk: Walk,
    sets: Bool[Array, "M G"],
    number: Array | int,
    node: tuple[int, ...] | None,
    tried: int,
) -> Walk:
    """One swap or change, if one of those that are tried decreases the cost."""
    phy2log, units, num_gpus = walk.phy2log, layer.units, sets.shape[1]
    capacity = phy2log.size // num_gpus
    slot = jnp.arange(phy2log.size, dtype=jnp.int32)
    gpu = slot // capacity
    held, inside, over_size = walk.held, walk.inside, _over_size(sets)
    ratio = inside * over_size[:, None]
    peak = jnp.max(ratio, axis=0)
    tightest = first_equal(ratio, peak)
    tight = take_rows(sets, tightest)  # [T, G]

    # The price of an expert in a window: by how much the square would fall without its load.
    weight = _excess(layer, peak).astype(jnp.float32) * layer.scale * take_rows(over_size, tightest)
    price = weight[:, None] * units
    bits = _LOAD_BITS - index_bits(len(units))  # so that sums are exact
    price = jnp.floor(price * (2.0**bits / jnp.maximum(jnp.max(price), 1e-30)))
    left, tight = replicas_outside(held, tight), tight.astype(jnp.float32)
    stuck = jnp.where(left == 0, price, 0)
    # What each slot adds to the price if it moves to another GPU, or holds nothing.
    base = jnp.sum(stuck, axis=0)[phy2log]
    gone = left[:, phy2log] == 1 - jnp.repeat(tight, capacity, axis=1)
    own = jnp.where(gone, price[:, phy2log], 0)
    moved = _dot(own.T, tight) - base[:, None]  # [R, G]
    dropped = jnp.sum(own, axis=0) - base
    added = -_dot(stuck.T, 1 - tight)  # [E, G]

    has = held > 0
    stays, absent = has[phy2log], ~has
    single = jnp.sum(held, axis=1, dtype=jnp.int32)[phy2log] < 2
    if node is not None:
        near = np.array(node)[:, None] == np.array(node)[None]
        stays |= ~jnp.asarray(near)[gpu]
        absent &= (has.astype(jnp.int32) @ jnp.asarray(near.astype(np.int32))) > 0
    moved = jnp.where(stays, _NEVER, moved)
    added = jnp.where(absent, added, _NEVER)
    # The best slot of a GPU to swap with, and the best expert to add to it.
    partners = moved.reshape(num_gpus, capacity, num_gpus)
    partner = jnp.min(partners, axis=1)  # [GPU of the partner, GPU that it moves to]
    swap = moved + jnp.repeat(partner.T, capacity, axis=0)  # [R, G]
    best_added = jnp.min(added, axis=0)
    change = jnp.where(single, _NEVER, dropped + jnp.repeat(best_added, capacity))
    best_swap = jnp.min(swap, axis=1)
    gain = jnp.concatenate([best_swap, change])

    row = jnp.arange(gain.size, dtype=jnp.uint32)
    # Eighths of the gain, another part in every step, so that a step without success is no end.
    part = row * np.uint32(2654435761) + jnp.asarray(number).astype(jnp.uint32) * np.uint32(40503)
    noise = ((part >> 13) & 3).astype(jnp.float32) / 8
    noisy = jnp.where(gain < _LIMIT, gain - unfused(gain * noise), _NEVER)
    chosen = lax.top_k(-noisy, min(gain.size, tried))[1]
    valid, is_swap = gain[chosen] < _LIMIT, chosen < slot.size
    first = chosen % slot.size
    out, here = phy2log[first], gpu[first]
    there = first_equal(swap[first].T, best_swap[first])
    beside = first_equal(partners[there, :, here].T, partner[there, here])
    second = jnp.where(is_swap, there * capacity + beside, first)
    new_expert = first_equal(added, best_added)[here]
    into = jnp.where(is_swap, phy2log[second], new_expert)

    there, alone = gpu[second], ~is_swap  # nothing comes back
    away, home = (~sets[:, x] for x in (here, there))  # [M, K]
    shift = jnp.where(alone[None], 0, home.astype(jnp.float32)) - away.astype(jnp.float32)
    out_gain = _now_inside(replicas_outside(held[out], sets), shift)
    into_gain = _now_inside(replicas_outside(held[into], sets), -shift)
    by_out, by_into = units[:, out], units[:, into]  # [T, K]
    after = by_out[None] * out_gain[:, None] + by_into[None] * into_gain[:, None]
    after = peak_of(after + inside[..., None], sets)
    back = jnp.where(alone, 0, layer.away[out, there] - layer.away[into, there])
    moves = walk.moves + layer.away[into, here] - layer.away[out, here] + back
    valid &= moves <= layer.max_moves
    cost = jnp.where(valid, cost_of(layer, after), np.iinfo(np.int32).max)
    least = jnp.min(cost)
    k = first_equal(cost, least)
    better = least < walk.cost
    one = better.astype(jnp.int32)
    back = jnp.where(alone[k], 0, one)
    x, y = out[k], into[k]
    new = phy2log.at[second[k]].set(jnp.where(alone[k], y, x)).at[first[k]].set(y)
    more = out_gain[:, k, None] * by_out[None, :, k] + into_gain[:, k, None] * by_into[None, :, k]
    return Walk(
        jnp.where(better, new, phy2log),
        held.at[x, here[k]]
        .add(-one)
        .at[x, there[k]]
        .add(back)
        .at[y, here[k]]
        .add(one)
        .at[y, there[k]]
        .add(-back),
        jnp.where(better, inside + more, inside),
        jnp.where(better, moves[k], walk.moves),
        jnp.where(better, least, walk.cost),
        jnp.where(better, 0, walk.failed + 1),
    )


def _dot(a: Float[Array, "n T"], b: Float[Array, "T m"]) -> Float[Array, "n m"]:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _now_inside(outside: Float[Array, "M K"], change: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """1 where a set now holds all replicas, -1 where it no longer does, else 0."""
    after = (outside + change == 0).astype(jnp.float32)
    return after - (outside == 0).astype(jnp.float32)
