"""The best swap of slots in every pair of GPUs."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import along, first_equal, positions_of, take_rows, unfused
from eplb_jax.packing.exchange import columns
from eplb_jax.packing.pair_exchange import schedule
from eplb_jax.transition.layer import Layer, Plan, is_home, ordered
from eplb_jax.transition.walk import (
    Goal,
    Walk,
    best_prefix,
    excess_of,
    first_k,
    per_move,
    scaled,
    squared,
    sum_over,
)

_RELAX = 0.8
"""Factor of the share of its pair's excess that a swap must remove, after rounds without one."""


def pairing(node: np.ndarray, rounds: int) -> tuple[np.ndarray, int]:
    """Ranks in the order in which they are paired, int32 [rounds, m], and h, the number of pairs.

    Ranks count the GPUs of the first node by descending load, then those of the next. The first h
    of a row are the partners of the next h, by the `schedule` of their node; the rest have none.
    """
    sizes = np.bincount(node)
    sizes = sizes[sizes > 0]
    first = np.cumsum(sizes) - sizes
    ranks = [schedule(int(size), rounds) + start for size, start in zip(sizes, first, strict=True)]
    half = [x.shape[1] // 2 for x in ranks]
    parts = [x[:, k * h : (k + 1) * h] for k in (0, 1) for x, h in zip(ranks, half, strict=True)]
    rest = [x[:, 2 * h :] for x, h in zip(ranks, half, strict=True)]
    return np.concatenate([*parts, *rest], axis=1).astype(np.int32), sum(half)


def _by_load(excess: Int32[Array, "m T"], node: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """The columns by node, then by descending excess: squares with their signs, over windows."""
    signed = (jnp.sign(excess) * squared(excess)).astype(jnp.float32)
    value, index = ordered(signed.T), jnp.arange(node.shape[0], dtype=jnp.int32)
    own, other = value[:, None], value[None]
    before = (other > own) | ((other == own) & (index[None] < index[:, None]))
    before = (node[None] < node[:, None]) | ((node[None] == node[:, None]) & before)
    return positions_of(index, jnp.sum(before, axis=1, dtype=jnp.int32))


_Bundles = list[tuple[np.ndarray, np.ndarray]]
"""The first and the last slot of what may be swapped for its like: one slot, and any two."""


def _bundles(capacity: int, *, two: bool) -> _Bundles:
    single = np.arange(capacity)
    pairs = np.triu_indices(capacity, k=1)
    return [(single, single), pairs] if two and capacity > 3 else [(single, single)]


def _codes(bundles: _Bundles) -> np.ndarray:
    """The slots of every swap, int32 [n, 4]: first and last of one GPU, then of the other."""
    codes = []
    for first, last in bundles:
        i, j = (x.ravel() for x in np.indices((len(first), len(first))))
        codes.append(np.stack([first[i], last[i], first[j], last[j]], axis=1))
    return np.concatenate(codes).astype(np.int32)


def swap_slots(
    layer: Layer,
    walk: Walk,
    goal: Goal,
    near: Float[Array, ""],
    ranks: Int32[Array, " m"],
    *,
    node: Int32[Array, " m"],
    half: int,
    two: bool,
) -> Walk:
    """The best swaps of all pairs whose gain per move is near the best."""
    plan, count = walk.plan, walk.plan.load.shape[1]
    capacity, num_gpus = plan.expert.shape
    empty = len(layer.units) - 1
    left, right = slice(half), slice(half, 2 * half)
    excess = excess_of(layer, plan, goal)
    order = take_rows(_by_load(excess, node[plan.gpu]), ranks)
    expert, gpu = columns(plan.expert, order), plan.gpu[order]
    excess, load = take_rows(excess, order).T, take_rows(plan.load, order).T
    table = jnp.moveaxis(
        take_rows(jnp.concatenate([plan.share, layer.home], axis=1), expert), -1, 0
    )
    value, bits = table[:count], table[count:]

    values = value[..., : 2 * half]
    here = there = scaled(values, layer.scale)
    if layer.pace is not None:
        pace = layer.pace[gpu[: 2 * half]] * layer.scale
        paces = pace[None, None], jnp.roll(pace, half)[None, None]
        here, there = (scaled(values, x) for x in paces)
    squares = squared(excess)
    now = ordered((squares[:, left] + squares[:, right]).astype(jnp.float32))
    own, other = (
        is_home(bits[..., : 2 * half], x[None]).astype(jnp.int32)
        for x in (gpu[: 2 * half], jnp.roll(gpu[: 2 * half], half))
    )
    a, b = expert[:, left], expert[:, right]
    same = a[:, None] == b[None]
    fixed = jnp.concatenate([jnp.any(same, axis=1), jnp.any(same, axis=0)], axis=1)
    fixed |= expert[:, : 2 * half] == empty
    rates, spends = [], []
    bundles = _bundles(capacity, two=two)
    for first, last in bundles:
        # The excess of a pair after the swap of bundle i of one GPU with bundle j of the other.
        mine, theirs, spend = here[:, first], there[:, first], (own - other)[first]
        stays = fixed[first]
        if len(first) and np.any(first != last):
            mine, theirs = mine + here[:, last], theirs + there[:, last]
            spend, stays = spend + (own - other)[last], stays | fixed[last]
        left_without, right_without = (excess[:, None, x] - mine[..., x] for x in (left, right))

        def after(t: int, without=(left_without, right_without), gives=theirs):
            one = without[0][t][:, None] + gives[t][None, :, right]
            two = without[1][t][None] + gives[t][:, None, left]
            return (squared(one) + squared(two)).astype(jnp.float32)

        gain = now[None, None] - sum_over(count, after)
        moves = spend[:, left][:, None] + spend[:, right][None]
        invalid = stays[:, left][:, None] | stays[:, right][None]
        rate = jnp.where(invalid, -1, per_move(gain, moves))
        rates.append(rate.reshape(-1, half))
        spends.append(moves.reshape(-1, half))
    rate, moves = jnp.concatenate(rates), jnp.concatenate(spends)
    largest = jnp.max(rate, axis=0)
    at = first_equal(rate, largest)
    over = ordered(jnp.where(excess > 0, squares, 0).astype(jnp.float32))
    over = over[left] + over[right]
    chosen = (largest > 0) & (over > 0)
    chosen &= largest >= near * jnp.maximum(jnp.max(largest), walk.rate)
    chosen &= 2 * largest >= walk.complete * over

    def both(one: Array, two: Array) -> Array:
        """Of the first and the second half of the GPUs, and zeros for one without a partner."""
        none = jnp.zeros((*one.shape[:-1], num_gpus - 2 * half), one.dtype)
        return jnp.concatenate([one, two, none], axis=-1)

    moved = jnp.where(chosen, along(moves, at[None], 0)[0], 0)
    row, code = jnp.arange(capacity, dtype=jnp.int32)[:, None], jnp.asarray(_codes(bundles))[at]
    # A bundle is its first and its last slot, which are the same for one slot.
    hits = [row == both(code[:, k], code[:, k + 2])[None] for k in (0, 1)]
    theirs = []
    for hit in hits:
        mine = jnp.sum(jnp.where(hit, expert, 0), axis=0, dtype=jnp.int32)
        theirs.append(both(mine[right], mine[left]))
    given = jnp.sum(jnp.where((hits[0] | hits[1])[None], value, 0), axis=1, dtype=jnp.int32)
    gained = jnp.where(both(chosen, chosen)[None], both(given[:, right], given[:, left]) - given, 0)
    time, time_after = (x.astype(jnp.float32) for x in (load, load + gained))
    if layer.pace is not None:
        time, time_after = (unfused(x * layer.pace[gpu][None]) for x in (time, time_after))
    done = first_k(largest, chosen)
    before_pair, after_pair = (jnp.maximum(x[:, left], x[:, right]) for x in (time, time_after))
    peak = jnp.max(jnp.where(done[None], after_pair[:, None], before_pair[:, None]), axis=2)
    for single in range(2 * half, num_gpus):
        peak = jnp.maximum(peak, time[:, single, None])
    spent = plan.moves + jnp.sum(jnp.where(done, moved[None], 0), axis=1, dtype=jnp.int32)

    def swapped(which: Bool[Array, " h"]) -> Int32[Array, "c m"]:
        new = jnp.where(hits[1], theirs[1][None], expert)
        new = jnp.where(hits[0], theirs[0][None], new)
        return jnp.where(both(which, which)[None], new, expert)

    best = best_prefix(walk.best, layer, goal, peak, spent, gpu, lambda k: swapped(done[k]))
    some = jnp.any(chosen)
    total = plan.moves + jnp.sum(moved, dtype=jnp.int32)
    return Walk(
        Plan(swapped(chosen), gpu, plan.replicas, plan.share, (load + gained).T, total),
        best,
        jnp.where(some, 0, walk.failed + 1),
        jnp.where(some, walk.complete, walk.complete * _RELAX),
        walk.rate,
    )
