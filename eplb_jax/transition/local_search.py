"""A better plan within a few moves of the one in place.

Every step swaps two slots or changes the expert of one: what lowers the sum of squared GPU loads
most for each move. Of the plans visited, the one of least imbalance + penalty * moves is
returned. A move is a slot with an expert that its GPU did not have in the old plan.

Loads are whole numbers, and floats are added in a fixed order: the plan of a layer does not depend
on the layers planned with it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import LOAD_BITS, fixed_point, normalise
from eplb_jax.transition.relabel import replicas_on_gpus, slots_kept
from eplb_jax.types import Topology

_SPARE_STEPS = 8
"""Number of steps beyond max_moves, for steps that find nothing or need no move."""


class _View(NamedTuple):
    """A plan and its loads, in units that add up to less than 2^30 a window."""

    units: Float[Array, "T E"]  # load of every expert
    held: Bool[Array, "m E"]  # whether a GPU has the expert in the old plan
    expert: Int32[Array, "m c"]  # in every slot
    placed: Int32[Array, "m E"]  # number of replicas of an expert on a GPU
    replicas: Int32[Array, " E"]  # number of replicas of an expert
    value: Int32[Array, "T m c"]  # load of every slot
    load: Int32[Array, "T m"]  # load of every GPU
    above: Int32[Array, "T m"]  # the same less the mean
    moves: Int32[Array, ""]  # from the old plan
    left: Int32[Array, ""]  # how many more moves there may be


class _Walk(NamedTuple):
    """The present plan, the best so far with its cost, and the number of failed steps in a row."""

    expert: Int32[Array, "m c"]
    best: Int32[Array, "m c"]
    cost: Float[Array, ""]
    step: Int32[Array, ""]
    failed: Int32[Array, ""]


class _Step(NamedTuple):
    """The next plan, the decrease of the squares per move, and whether it is within one node."""

    expert: Int32[Array, "m c"]
    rate: Float[Array, ""]
    local: Bool[Array, ""]


@partial(jax.jit, static_argnames=("topology", "hierarchical"))
def improve_plan(
    windows: Float[Array, "L T E"],
    old: Int32[Array, "L R"],
    max_moves: Int32[Array, ""],
    penalty: Float[Array, ""],
    *,
    topology: Topology,
    hierarchical: bool,
) -> tuple[Int32[Array, "L R"], Float[Array, " L"]]:
    """The expert in every slot, at most `max_moves` moves a layer from the old plan, and its cost.

    The cost is imbalance + penalty * moves. In a hierarchical plan experts stay on their nodes;
    otherwise a change inside a node is preferred to an equally good one.
    """
    improve = partial(_improve_layer, topology=topology, hierarchical=hierarchical)
    max_moves = jnp.minimum(max_moves, topology.num_replicas)
    return jax.vmap(improve, (0, 0, None, None))(windows, old, max_moves, penalty)


def plan_cost(
    windows: Float[Array, "L T E"],
    new: Int32[Array, "L R"],
    old: Int32[Array, "L R"],
    penalty: Float[Array, ""],
    *,
    topology: Topology,
) -> tuple[Int32[Array, " L"], Float[Array, " L"]]:
    """The moves to a new plan, and its cost as of `improve_plan`."""

    def cost_of(windows: Array, new: Array, old: Array) -> tuple[Array, Array]:
        before, after = (x.reshape(topology.num_gpus, topology.slots) for x in (old, new))
        held = replicas_on_gpus(before, windows.shape[1]) > 0
        view = _view(_units(windows), held, jnp.zeros((), jnp.int32), after)
        return view.moves, _cost(view, penalty)

    return jax.vmap(cost_of)(windows, new, old)


def _improve_layer(
    windows: Float[Array, "T E"],
    old: Int32[Array, " R"],
    max_moves: Int32[Array, ""],
    penalty: Float[Array, ""],
    *,
    topology: Topology,
    hierarchical: bool,
) -> tuple[Int32[Array, " R"], Float[Array, ""]]:
    num_gpus = topology.num_gpus
    start = old.reshape(num_gpus, topology.slots)
    held = replicas_on_gpus(start, windows.shape[1]) > 0
    view_of = partial(_view, _units(windows), held, max_moves)
    steps = jnp.where(max_moves > 0, max_moves + _SPARE_STEPS, 0)

    def may_improve(walk: _Walk) -> Array:
        return (walk.step < steps) & (walk.failed < num_gpus)  # then every GPU has been tried

    def improve(walk: _Walk) -> _Walk:
        view = view_of(walk.expert)
        walk = _keep_best(walk, _cost(view, penalty))
        swap = _swap(view, walk.failed, topology, hierarchical)
        change = _change(view, topology, hierarchical)
        more_local = swap.local | ~change.local
        first = (swap.rate > change.rate) | ((swap.rate == change.rate) & more_local)
        step: _Step = jax.tree.map(partial(jnp.where, first), swap, change)
        good = step.rate > 0
        return walk._replace(
            expert=jnp.where(good, step.expert, walk.expert),
            step=walk.step + 1,
            failed=jnp.where(good, 0, walk.failed + 1),
        )

    zero = jnp.zeros((), jnp.int32)
    begin = _Walk(start, start, jnp.asarray(jnp.inf, jnp.float32), zero, zero)
    end = lax.while_loop(may_improve, improve, begin)
    end = _keep_best(end, _cost(view_of(end.expert), penalty))
    kept = jax.vmap(slots_kept)(end.best, start)
    return jnp.take_along_axis(end.best, kept, axis=1).ravel(), end.cost


def _keep_best(walk: _Walk, cost: Float[Array, ""]) -> _Walk:
    """The walk, with the present plan as the best if it costs less."""
    better = cost < walk.cost
    best = jnp.where(better, walk.expert, walk.best)
    return walk._replace(best=best, cost=jnp.where(better, cost, walk.cost))


def _units(windows: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Loads as whole numbers, those of a window adding up to less than 2^30."""
    units = fixed_point(normalise(windows, (0, 1)), windows.shape[1], LOAD_BITS)
    return units.astype(jnp.float32)


def _share(units: Float[Array, "T E"], count: Int32[Array, " E"]) -> Int32[Array, "T E"]:
    """The load of each replica of experts that have so many."""
    return (units * (1 / jnp.maximum(count, 1).astype(jnp.float32))[None]).astype(jnp.int32)


def _view(
    units: Float[Array, "T E"],
    held: Bool[Array, "m E"],
    max_moves: Int32[Array, ""],
    expert: Int32[Array, "m c"],
) -> _View:
    """The loads and moves of a plan."""
    num_gpus, num_experts = held.shape
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
    placed = replicas_on_gpus(expert, num_experts)
    count = jnp.sum(placed, axis=0, dtype=jnp.int32)
    value = _share(units, count)[:, expert]
    load = jnp.sum(value, axis=2, dtype=jnp.int32)
    above = load - jnp.sum(load, axis=1, keepdims=True, dtype=jnp.int32) // num_gpus
    moves = jnp.sum(~held[gpu, expert], dtype=jnp.int32)
    return _View(units, held, expert, placed, count, value, load, above, moves, max_moves - moves)


def _cost(view: _View, penalty: Float[Array, ""]) -> Float[Array, ""]:
    """Imbalance (max / mean GPU load - 1, of windows added up) + penalty * moves."""
    most = _sum(jnp.max(view.load, axis=1).astype(jnp.float32))
    total = _sum(jnp.sum(view.load, axis=1, dtype=jnp.int32).astype(jnp.float32))
    ratio = most * view.load.shape[1] / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, ratio, 1) - 1 + _product(penalty, view.moves)


def _product(x: Array, y: Array) -> Float[Array, "..."]:
    """The product to 23 bits, which no compiler can fuse with an addition."""
    return lax.reduce_precision(x.astype(jnp.float32) * y.astype(jnp.float32), 8, 22)


def _sum(x: Float[Array, "k *n"]) -> Float[Array, "*n"]:
    """The sum over the first axis, in an order that depends on its length alone."""
    while len(x) > 1:
        half = len(x) // 2
        x = jnp.concatenate([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0]


def _twice(x: Array, y: Array) -> Float[Array, "..."]:
    """2 * x + y, which may not fit in an int32."""
    return 2 * x.astype(jnp.float32) + y.astype(jnp.float32)


def _best(rate: Float[Array, "*m n"], local: Bool[Array, "*m n"]) -> Int32[Array, "*m"]:
    """The position of the maximum of every row: the first local one, if there is one."""
    count = rate.shape[-1]
    order = lax.broadcasted_iota(jnp.int32, rate.shape, rate.ndim - 1)
    order += jnp.where(local, 0, count)
    largest = rate == jnp.max(rate, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, order, 2 * count), axis=-1) % count


def _per_move(gain: Float[Array, "..."], moves: Int32[Array, "..."]) -> Float[Array, "..."]:
    """The gain of each move; without a move, twice the gain."""
    return gain / jnp.maximum(moves.astype(jnp.float32), 0.5)


def _swap(view: _View, failed: Int32[Array, ""], topology: Topology, hierarchical: bool) -> _Step:
    """The best swap of a slot of the most loaded GPU, or of the next after failures."""
    expert, placed = view.expert, view.placed
    num_gpus, slots = expert.shape
    other = jnp.arange(num_gpus, dtype=jnp.int32)
    over = jnp.maximum(view.above, 0)
    order = jnp.argsort(-_sum(_product(over, over)), stable=True).astype(jnp.int32)
    gpu = order[failed % num_gpus]
    mine = expert[gpu]
    lost = view.value[:, gpu, :, None, None] - view.value[:, None]  # [T, c, m, c]
    apart = view.load[:, gpu, None] - view.load
    gain = 2 * _sum(_product(lost, apart[:, None, :, None] - lost))
    held = view.held.astype(jnp.int32)
    theirs = held[other[:, None], expert] - held[gpu][expert]  # [m, c]
    ours = held[gpu, mine][:, None] - held[:, mine].T  # [c, m]
    moves = ours[:, :, None] + theirs[None]
    duplicate = (placed[:, mine].T > 0)[:, :, None] | (placed[gpu][expert] > 0)[None]
    local = (other // topology.gpus_per_node == gpu // topology.gpus_per_node)[None, :, None]
    invalid = duplicate | (moves > view.left) | (~local & hierarchical)
    rate = jnp.where(invalid, -jnp.inf, _per_move(gain, moves)).ravel()
    best = _best(rate, jnp.broadcast_to(local, moves.shape).ravel())
    one, two = gpu * slots + best // (num_gpus * slots), best % (num_gpus * slots)
    flat = expert.ravel()
    after = flat.at[one].set(flat[two]).at[two].set(flat[one]).reshape(expert.shape)
    return _Step(after, rate[best], local[0, two // slots, 0])


def _change(view: _View, topology: Topology, hierarchical: bool) -> _Step:
    """The best change of a slot to another expert.

    The slot and the expert of a GPU are chosen apart, as if the two shared no GPU. Then the gain of
    each GPU's choice is exact.
    """
    expert, placed, replicas = view.expert, view.placed, view.replicas
    num_gpus, num_experts = placed.shape
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)
    # The load of a replica now, with one replica less and with one more.
    now, less, more = (_share(view.units, replicas + change) for change in (0, -1, 1))
    rise, fall = less - now, now - more
    around = jnp.zeros_like(now).at[:, expert].add(view.above[:, :, None])  # of its GPUs
    loss = _product(rise, _twice(around, (replicas[None] - 1) * rise)) + _product(now, now)
    loss = loss[:, expert] - 2 * _product(view.above[:, :, None], less[:, expert])
    single = replicas[expert] < 2
    slot = _best(jnp.where(single, -jnp.inf, -_sum(loss)), jnp.ones_like(single))
    dropped = expert[gpu, slot]
    gain = _product(fall, _twice(around, -replicas[None] * fall)) - _product(more, more)
    gain = _sum(gain[:, None] - 2 * _product(view.above[:, :, None], more[:, None]))  # [m, E]
    nodes = placed.reshape(topology.num_nodes, topology.gpus_per_node, num_experts)
    local = jnp.repeat(jnp.any(nodes > 0, axis=1), topology.gpus_per_node, axis=0)
    held = view.held.astype(jnp.int32)
    moves = held[gpu, dropped][:, None] - held
    invalid = (placed > 0) | (moves > view.left) | (~local & hierarchical) | single[gpu, slot, None]
    added = _best(jnp.where(invalid, -jnp.inf, gain), local)
    change = (
        rise[:, None, dropped] * placed[None, :, dropped]
        - fall[:, None, added] * placed[None, :, added]
        + jnp.eye(num_gpus, dtype=jnp.int32)[None] * (more[:, added] - less[:, dropped])[:, None]
    )  # [T, m, m]: of the load of every GPU, by each choice
    gain = -_sum(_sum(_product(change, _twice(view.above[:, :, None], change))))
    rate = jnp.where(invalid[gpu, added], -jnp.inf, _per_move(gain, moves[gpu, added]))
    best = _best(rate, local[gpu, added])
    after = expert.at[best, slot[best]].set(added[best])
    return _Step(after, rate[best], local[best, added[best]])
