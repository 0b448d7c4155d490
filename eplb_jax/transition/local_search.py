"""A better plan within a few moves of the one in place.

From the old plan, step by step: the exchange of two slots, or the change of one slot to another
expert, that evens loads most for each copy that has to be fetched. Plans on the way are compared
by imbalance + price x moves, and the best is kept.
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import unfused
from eplb_jax.transition.relabel import slots_kept
from eplb_jax.types import Topology

_NEVER = float(np.finfo(np.float32).max)


class _Walk(NamedTuple):
    """A plan on the way, the best so far, and how many steps have found nothing since."""

    expert: Int32[Array, "m c"]
    best: Int32[Array, "m c"]
    cost: Float[Array, ""]
    failed: Int32[Array, ""]


class _View(NamedTuple):
    """What a plan comes to.

    ``share`` is what a replica of every expert carries, ``value`` what lies in every slot;
    ``held`` says which experts lay on which GPU in the old plan, ``left`` how many more may be
    fetched.
    """

    load: Float[Array, "T E"]
    expert: Int32[Array, "m c"]
    replicas: Float[Array, " E"]
    share: Float[Array, "T E"]
    value: Float[Array, "T m c"]
    loads: Float[Array, "T m"]
    held: Bool[Array, "m E"]
    left: Int32[Array, ""]


class _Step(NamedTuple):
    """A change of a plan: what it gains in squares, what it fetches, and the plan after it."""

    gain: Float[Array, ""]
    moves: Int32[Array, ""]
    expert: Int32[Array, "m c"]


@partial(jax.jit, static_argnames=("topology", "hierarchical"))
def improve_plan(
    windows: Float[Array, "L T E"],
    old: Int32[Array, "L R"],
    max_moves: Int32[Array, ""],
    price: Float[Array, ""],
    *,
    topology: Topology,
    hierarchical: bool,
) -> tuple[Int32[Array, "L R"], Float[Array, " L"]]:
    """The expert in every slot, at most `max_moves` of a layer fetched from another GPU.

    Also imbalance + price x moves of that plan. Experts stay within their nodes.
    """
    num_gpus, num_nodes = topology.num_gpus, topology.num_nodes if hierarchical else 1
    size = old.shape[1] // num_gpus
    max_moves = jnp.minimum(max_moves, topology.num_replicas)

    def layer(load: Float[Array, "T E"], old: Int32[Array, " R"]) -> tuple[Array, Array]:
        start = old.reshape(num_gpus, size)
        held = _held(start, load.shape[1]) > 0

        def noted(walk: _Walk, view: _View) -> _Walk:
            moves = (max_moves - view.left).astype(jnp.float32)
            cost = _imbalance(view.loads) + price * moves
            better = cost < walk.cost
            best = jnp.where(better, walk.expert, walk.best)
            return walk._replace(best=best, cost=jnp.where(better, cost, walk.cost))

        def view_of(expert: Int32[Array, "m c"]) -> _View:
            return _View(*_seen(load, expert), held, max_moves - _fetched(expert, held))

        def step(_: Array | int, walk: _Walk) -> _Walk:
            view = view_of(walk.expert)
            walk = noted(walk, view)
            options = _exchange(view, num_nodes, walk.failed), _change(view, num_nodes)
            rate = [x.gain / _at_least_half(x.moves) for x in options]
            first = rate[0] >= rate[1]
            chosen = jax.tree.map(lambda x, y: jnp.where(first, x, y), *options)
            good = chosen.gain > 0
            expert = jnp.where(good, chosen.expert, walk.expert)
            return walk._replace(expert=expert, failed=jnp.where(good, 0, walk.failed + 1))

        steps = jnp.where(max_moves > 0, max_moves + _SPARE_STEPS, 0)
        begin = _Walk(start, start, jnp.asarray(jnp.inf), jnp.zeros((), jnp.int32))
        end = lax.fori_loop(0, steps, step, begin)
        end = noted(end, view_of(end.expert))
        kept = jax.vmap(slots_kept)(end.best, start)
        return jnp.take_along_axis(end.best, kept, axis=1).ravel(), end.cost

    return jax.vmap(layer)(windows, old)


_SPARE_STEPS = 8
"""That may find nothing, or cost nothing."""


def plan_cost(
    windows: Float[Array, "L T E"],
    new: Int32[Array, "L R"],
    old: Int32[Array, "L R"],
    *,
    num_gpus: int,
) -> tuple[Int32[Array, " L"], Float[Array, " L"]]:
    """How many slots a new plan fetches from another GPU, and its imbalance."""

    def layer(load: Array, new: Array, old: Array) -> tuple[Array, Array]:
        before, after = (x.reshape(num_gpus, -1) for x in (old, new))
        moves = _fetched(after, _held(before, load.shape[1]) > 0)
        return moves, _imbalance(_seen(load, after)[-1])

    return jax.vmap(layer)(windows, new, old)


def _held(expert: Int32[Array, "m c"], num_experts: int) -> Float[Array, "m E"]:
    """How many replicas of every expert lie on every GPU."""
    index = jnp.arange(num_experts, dtype=jnp.int32)
    return reduce(jnp.add, [(x[:, None] == index).astype(jnp.float32) for x in expert.T])


def _fetched(expert: Int32[Array, "m c"], held: Bool[Array, "m E"]) -> Int32[Array, ""]:
    """How many slots hold what their GPU did not."""
    return jnp.sum(~held[_gpus(expert), expert], dtype=jnp.int32)


def _gpus(expert: Int32[Array, "m c"]) -> Int32[Array, "m 1"]:
    return jnp.arange(expert.shape[0], dtype=jnp.int32)[:, None]


def _seen(
    load: Float[Array, "T E"], expert: Int32[Array, "m c"]
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """The first fields of a `_View`."""
    count = jnp.zeros(load.shape[1], jnp.float32).at[expert].add(1)
    share = load / jnp.maximum(count, 1)
    value = share[:, expert]
    return load, expert, count, share, value, jnp.sum(value, axis=2)


def _imbalance(loads: Float[Array, "T m"]) -> Float[Array, ""]:
    """Heaviest / mean GPU - 1, in the mean over windows."""
    mean = jnp.mean(loads)
    heaviest = jnp.mean(jnp.max(loads, axis=1))
    return jnp.where(mean > 0, heaviest / jnp.where(mean > 0, mean, 1), 1) - 1


def _at_least_half(moves: Int32[Array, "..."]) -> Float[Array, "..."]:
    """What gains are divided by: a change that fetches nothing is worth twice one that does."""
    return jnp.maximum(moves.astype(jnp.float32), 0.5)


def _largest(x: Float[Array, "*m n"]) -> Int32[Array, "*m"]:
    """Where the largest of every row stands first."""
    x = unfused(x)
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, index[-1]), axis=-1)


def _exchange(view: _View, num_nodes: int, failed: Int32[Array, ""]) -> _Step:
    """One slot of the worst GPU, or the next worst after failures, for one of any other."""
    expert, loads = view.expert, view.loads
    num_gpus, size = expert.shape
    above = jnp.maximum(loads - jnp.mean(loads, axis=1, keepdims=True), 0)
    order = jnp.argsort(-jnp.sum(jnp.square(above), axis=0), stable=True)
    gpu = order[failed % num_gpus].astype(jnp.int32)

    mine, a = expert[gpu], view.value[:, gpu]  # [c], [T, c]
    apart = loads[:, gpu, None] - loads  # [T, m]
    # With x for y the squares fall by 2 (x - y) (apart - (x - y)).
    given = jnp.matmul(a.T, apart, precision="highest") - jnp.sum(jnp.square(a), 0)[:, None]
    taken = jnp.sum(view.value * (apart[:, :, None] + view.value), axis=0)  # [m, c]
    both = jnp.tensordot(a, view.value, axes=(0, 0), precision="highest")  # [c, m, c]
    gain = 2 * (given[:, :, None] - taken + 2 * both)
    held = view.held.astype(jnp.int32)
    fetched = held[_gpus(expert), expert] - held[gpu][expert]  # [m, c]
    sent = held[gpu][mine][:, None] - held[:, mine].T  # [c, m]
    moves = sent[:, :, None] + fetched  # [c, m, c]
    known = jnp.any(mine[:, None, None] == expert, axis=2)  # [c, m]: there already
    known_here = jnp.any(expert[:, :, None] == mine, axis=2)  # [m, c]
    node = jnp.arange(num_gpus, dtype=jnp.int32) // (num_gpus // num_nodes)
    far = (node != node[gpu])[:, None]
    barred = known[:, :, None] | known_here | far | (moves > view.left)
    rate = jnp.where(barred, -_NEVER, gain) / _at_least_half(moves)
    best = _largest(rate.ravel())
    here, there = best // (num_gpus * size), best % (num_gpus * size)
    flat, slot = expert.ravel(), gpu * size + here
    after = flat.at[slot].set(flat[there]).at[there].set(flat[slot])
    return _Step(
        jnp.where(barred.ravel()[best], -1.0, gain.ravel()[best]),
        moves.ravel()[best],
        after.reshape(expert.shape),
    )


def _change(view: _View, num_nodes: int) -> _Step:
    """Another expert in one slot: one replica less of what it held, one more of the other.

    On every GPU the slot and the expert are chosen apart, which leaves out that the two may share
    GPUs; what each GPU's choice gains is then counted exactly.
    """
    expert, count, share, held = view.expert, view.replicas, view.share, view.held
    num_gpus, num_experts = expert.shape[0], count.shape[0]
    lies = _held(expert, num_experts)
    loads = view.loads - jnp.mean(view.loads, axis=1, keepdims=True)
    around = jnp.matmul(loads, lies, precision="highest")  # [T, E]: of the GPUs of an expert
    # One replica less: the others carry `more`, the GPU of the slot that much and `share` less.
    more = share / jnp.maximum(count - 1, 1)
    others = jnp.sum(more * (2 * around + (count - 1) * more) + jnp.square(share), axis=0)
    own = 2 * jnp.matmul(loads.T, more + share, precision="highest")  # [m, E]
    loss = others[expert] - own[_gpus(expert), expert]
    slot = _largest(jnp.where(count[expert] < 2, -_NEVER, -loss))  # [m]
    # One replica more: those there are carry `less` less, the GPU `new` more.
    new = view.load / (count + 1)
    less = share - new
    gain = jnp.sum(less * (2 * around - count * less) - jnp.square(new), axis=0)
    add = gain - 2 * jnp.matmul(loads.T, new, precision="highest")  # [m, E]
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)
    dropped = expert[gpu, slot]
    nodes = lies.reshape(num_nodes, num_gpus // num_nodes, num_experts)
    reachable = jnp.repeat(jnp.max(nodes, axis=1) > 0, num_gpus // num_nodes, axis=0)
    moves = held[gpu, dropped].astype(jnp.int32)[:, None] - held.astype(jnp.int32)
    barred = (lies > 0) | ~reachable | (moves > view.left) | (count[dropped] < 2)[:, None]
    wanted = _largest(jnp.where(barred, -_NEVER, add))  # [m]
    change = (
        more[:, dropped, None] * lies.T[dropped]
        - less[:, wanted, None] * lies.T[wanted]
        + jnp.eye(num_gpus, dtype=jnp.float32)
        * (new[:, wanted] - (more + share)[:, dropped])[:, :, None]
    )
    exact = -jnp.sum(change * (2 * loads[:, None] + change), axis=(0, 2))  # [m]
    exact = jnp.where(barred[gpu, wanted], -1.0, exact)
    spent = moves[gpu, wanted]
    one = _largest(exact / _at_least_half(spent))
    return _Step(exact[one], spent[one], expert.at[one, slot[one]].set(wanted[one]))
