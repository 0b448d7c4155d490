"""Slots changed to other experts, which changes replica counts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import along, first_equal, take_rows, unfused
from eplb_jax.transition.layer import Layer, Plan, is_home, ordered, share_of
from eplb_jax.transition.walk import (
    MOST,
    Goal,
    Walk,
    best_prefix,
    excess_of,
    first_k,
    per_move,
    product,
    scaled,
    squared,
    sum_over,
)

_CHANGES = 4
"""Number of slots that are changed to other experts in one round."""


def change_experts(
    layer: Layer,
    walk: Walk,
    goal: Goal,
    near: Float[Array, ""],
    *,
    node: Int32[Array, " m"],
    bound: bool,
) -> Walk:
    """Slots changed to other experts, on distinct GPUs.

    Which slot a GPU gives up and which expert it gets is chosen by the slope of the squares, apart
    from each other. Then the gain of each change is exact.
    """
    plan, count, share = walk.plan, walk.plan.replicas, walk.plan.share
    expert, gpu = plan.expert, plan.gpu
    num_gpus, windows, empty = expert.shape[1], share.shape[1], len(layer.units) - 1
    excess = excess_of(layer, plan, goal)
    slope = 2 * jnp.clip(excess, -MOST, MOST).astype(jnp.float32)  # [m, T]
    around = jnp.zeros(share.shape, jnp.float32).at[expert].add(slope[None])  # of its GPUs
    less, more = share_of(layer.units, count - 1), share_of(layer.units, count + 1)
    rise, fall, here, there = (
        x.astype(jnp.float32) * layer.scale for x in (less - share, share - more, less, more)
    )
    n = count.astype(jnp.float32)[:, None]
    lost = ordered((product(rise, around) + product(product(rise, rise), n - 1)).T)
    won = ordered((product(fall, around) - product(product(fall, fall), n)).T)
    own = jnp.moveaxis(take_rows(here, expert), -1, 0)
    loss = lost[expert] - sum_over(windows, lambda t: product(own[t], slope[None, :, t]))
    loss = jnp.where((count[expert] < 2) | (expert == empty), jnp.inf, loss)
    least = jnp.min(loss, axis=0)
    slot = first_equal(loss, least)
    dropped = along(expert, slot[None], 0)[0]  # of every GPU

    wanted = _largest(won.at[empty].set(-jnp.inf), 2 * _CHANGES)
    burden = take_rows(there, wanted)  # [k, T]
    cost = sum_over(
        windows,
        lambda t: (
            product(burden[:, t, None], slope[None, :, t])
            + product(burden[:, t], burden[:, t])[:, None]
        ),
    )
    has = jnp.any(expert[None] == wanted[:, None, None], axis=1)
    invalid = has | (least == jnp.inf)[None]
    if bound:
        there_too = jnp.any(has[:, None] & (node[gpu][:, None] == node[gpu][None])[None], axis=2)
        invalid |= ~there_too
    moves = is_home(layer.home.T[:, dropped], gpu).astype(jnp.int32)[None]
    moves -= is_home(layer.home.T[:, wanted][..., None], gpu[None]).astype(jnp.int32)
    gain = jnp.where(invalid, -jnp.inf, won[wanted][:, None] - cost - least[None])

    # Of all GPUs and experts, some with distinct GPUs and experts.
    at, expected = [], []
    for _ in range(_CHANGES):
        one = first_equal(gain.ravel(), jnp.max(gain))
        at.append(one)
        expected.append(gain.ravel()[one])
        k, g = one // num_gpus, one % num_gpus
        taken = (jnp.arange(len(wanted), dtype=jnp.int32) == k) | (wanted == dropped[g])
        gone = (dropped == dropped[g]) | (dropped == wanted[k])
        gain = jnp.where(taken[:, None] | gone[None], -jnp.inf, gain)
    at, expected = jnp.stack(at), jnp.stack(expected)
    k, g = at // num_gpus, at % num_gpus
    out, into, moved = dropped[g], wanted[k], moves[k, g]
    row, column = (jnp.arange(x, dtype=jnp.int32) for x in expert.shape)
    on_out, on_into = (
        jnp.sum(x[None, None] == expert[..., None], axis=0, dtype=jnp.int32)[None]
        for x in (out, into)
    )
    change = (
        on_out * (less - share)[out].T[:, None]
        - on_into * (share - more)[into].T[:, None]
        + jnp.where((column[:, None] == g[None])[None], (more[into] - less[out]).T[:, None], 0)
    )  # [T, m, k]: of the load of every GPU
    factor = layer.scale if layer.pace is None else (layer.pace[gpu] * layer.scale)[None, :, None]
    excess = excess.T[:, :, None]
    exact = (squared(excess) - squared(excess + scaled(change, factor))).astype(jnp.float32)
    exact = ordered(ordered(exact))
    rate = jnp.where(expected > -jnp.inf, per_move(exact, moved), -1)
    largest = jnp.max(rate)
    chosen = (rate > 0) & (rate >= near * largest)

    done = first_k(rate, chosen)  # [k, k]
    parts = jnp.where(done[None, None], change[:, :, None], 0)
    loads = plan.load.T[:, :, None] + jnp.sum(parts, axis=3, dtype=jnp.int32)
    time = loads.astype(jnp.float32)
    if layer.pace is not None:
        time = unfused(time * layer.pace[gpu][None, :, None])
    spent = plan.moves + jnp.sum(jnp.where(done, moved[None], 0), axis=1, dtype=jnp.int32)

    def changed(which: Bool[Array, " k"]) -> Int32[Array, "c m"]:
        hit = (row[:, None, None] == slot[g][None, None]) & which[None, None]
        hit &= (column[:, None] == g[None])[None]
        new = jnp.sum(jnp.where(hit, into[None, None], 0), axis=2, dtype=jnp.int32)
        return jnp.where(jnp.any(hit, axis=2), new, expert)

    best = best_prefix(
        walk.best, layer, goal, jnp.max(time, axis=1), spent, gpu, lambda k: changed(done[k])
    )
    number = jnp.arange(empty + 1, dtype=jnp.int32)[:, None]
    gone, come = (jnp.any((number == x[None]) & chosen[None], axis=1) for x in (out, into))
    count = count - gone.astype(jnp.int32) + come.astype(jnp.int32)
    share = jnp.where(gone[:, None], less, jnp.where(come[:, None], more, share))
    new = Plan(changed(chosen), gpu, count, share, loads[..., -1].T, spent[-1])
    rate = jnp.where(jnp.any(chosen), largest, 0)
    return walk._replace(
        plan=new, best=best, failed=jnp.where(jnp.any(chosen), 0, walk.failed), rate=rate
    )


def _largest(x: Float[Array, " n"], count: int) -> Int32[Array, " k"]:
    """The positions of the largest, one after the other."""
    found = []
    for _ in range(min(count, x.shape[0])):
        one = first_equal(x, jnp.max(x))
        found.append(one)
        x = jnp.where(jnp.arange(x.shape[0], dtype=jnp.int32) == one, -jnp.inf, x)
    return jnp.stack(found)
