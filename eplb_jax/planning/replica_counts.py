"""Replica counts chosen together with the packing: for GPUs of two or three slots.

With more slots a GPU, packing balances whatever counts the greedy gives. With two, only the counts
matter: the best packing is the fold, largest with smallest, and a balanced fold needs replicas
that mirror each other about half the load of a GPU. Greedy counts ignore that.

With two slots, T is the maximum GPU load of some plan if and only if for every v above T / 2 there
are no more replicas of at least v than of at most T - v, their partners (Hall's condition). So an
expert of load w with k replicas adds k to the excess at every v <= w / k, or takes k from it at
every v <= T - w / k, and counts serve T if no excess is above zero. As that is a sum over experts,
the effect of one changed count on all excesses is known without packing or sorting anything.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import first_equal, fixed_point, unfused
from eplb_jax.planning.replication import replicate

_BITS = 30
_LEVELS = 128
"""Number of levels v between T / 2 and T."""

_ALL = 64
"""Below this many experts a step considers all of them, and greedy counts are packed as well."""

_LEVELS_AT_ONCE = 8
"""Number of levels that one kernel adds up."""

_DEPTHS = (1, 2, 3)
"""How many counts a move increases, and how many it decreases."""

_TOO_LARGE = 1 << 20
"""Cost of a replica above T: more than any sum of excesses."""

_NEVER = 1 << 30

_OFFSETS = (0.0, 0.1, 0.5, 0.25, 2.0)
"""Offsets of counts before loads are divided by them; 0 is the greedy."""


@dataclass(frozen=True)
class CountSearch:
    """How to search for replica counts.

    With two slots a GPU: walks of `moves` moves from the greedy counts, one for each of `targets`
    loads T from the lower bound up to what the greedy counts reach. A move takes 1, 2 or 3 replicas
    from experts and gives as many to others, or the reverse, each so that the sum of positive
    excesses becomes least. Of the counts that come closest to a target, the ones with the best fold
    are used.

    With three: spares go to the largest load w / (k + d), k the count so far, for the first
    `divisors` of several d, and the counts with the best packing are used.

    References:
        P. Hall, "On representatives of subsets", Journal of the London Mathematical Society 10,
        1935. F. Glover, "Tabu search - part I", ORSA Journal on Computing 1, 1989: an expert
        whose count a move has changed is not touched again within it.
    """

    targets: int
    moves: int
    divisors: int

    def candidates(
        self,
        load: Float[Array, "L E"],
        num_replicas: int,
        num_gpus: int,
        most: int | None,
        empty: Int32[Array, " L"] | None = None,
    ) -> Int32[Array, "L K E"]:
        """Counts to choose from by packing them, the greedy ones first; none above `most`.

        `empty` is that of `replicate`: the last expert is not one.
        """
        capacity = num_replicas // num_gpus if num_replicas > load.shape[1] else 1
        offsets = _OFFSETS[: self.divisors if capacity == 3 else 1]
        counts = [replicate(load, num_replicas, most, d, empty).logcnt for d in offsets]
        if capacity == 2:
            fixed = 0 if empty is None else 1
            search = partial(_for_pairs, num_gpus=num_gpus, search=self, fixed=fixed)
            found = jax.vmap(search)(load, counts[0])
            # Few experts have no others to exchange duplicates with: greedy counts may pack better.
            counts = [*counts, found] if load.shape[1] < _ALL else [found]
        return jnp.stack(counts, axis=1)


class _Walk(NamedTuple):
    """Carry of `_walk`: the counts of all experts, and the best so far."""

    counts: Int32[Array, " E"]
    excess: Int32[Array, " v"]  # at every level
    touched: Bool[Array, " E"]  # experts that the move has changed so far
    best: Int32[Array, " E"]  # counts of least cost at the end of a move
    cost: Int32[Array, ""]  # their sum of positive excesses


def _for_pairs(
    load: Float[Array, " E"],
    greedy: Int32[Array, " E"],
    num_gpus: int,
    search: CountSearch,
    fixed: int,
) -> Int32[Array, " E"]:
    """Counts for two slots a GPU, no worse than the greedy ones; none above `num_gpus`.

    Those of the last `fixed` experts, which have no load, stay.
    """
    order = jnp.argsort(-load, stable=True).astype(jnp.int32)
    greedy = greedy[order]
    units = fixed_point(load[order], load.shape[0], _BITS)
    mean = jnp.sum(units, dtype=jnp.int32).astype(load.dtype) / num_gpus
    units = units.astype(load.dtype)
    least = jnp.maximum(mean, jnp.max(units / jnp.maximum(greedy, 1).astype(load.dtype)))
    apart = (_fold(units, greedy, num_gpus) - least) / search.targets
    targets = least + unfused(apart * jnp.arange(search.targets, dtype=load.dtype))
    targets = jnp.maximum(targets, 1)

    walk = partial(_walk, units, greedy, most=num_gpus, moves=search.moves, fixed=fixed)
    found = jnp.concatenate([greedy[None], jax.vmap(lambda x: walk(target=x))(targets)])
    largest = jax.vmap(lambda counts: _fold(units, counts, num_gpus))(found)
    best = found[first_equal(largest, jnp.min(largest))]
    return jnp.zeros_like(best).at[order].set(best)


def _fold(load: Float[Array, " E"], counts: Int32[Array, " E"], num_gpus: int) -> Float[Array, ""]:
    """The maximum load of a pair if the largest replica goes with the smallest, and so on.

    Where that pairs replicas of one expert, which are in the middle of the order, they are
    exchanged with the next pairs that do not hold it.
    """
    share = load / jnp.maximum(counts, 1).astype(load.dtype)
    descending = -jnp.sort(-jnp.repeat(share, counts, total_repeat_length=2 * num_gpus))
    large, small = descending[:num_gpus], descending[num_gpus:]
    middle = large[-1]
    before, after = (jnp.sum(x == middle, dtype=jnp.int32) for x in (large, small))
    alike = jnp.minimum(before, after)
    partner = large[jnp.maximum(num_gpus - jnp.maximum(before, after) - alike, 0)]
    return jnp.maximum(jnp.max(large + small[::-1]), jnp.where(alike > 0, middle + partner, 0))


def _walk(
    load: Float[Array, " E"],
    counts: Int32[Array, " E"],
    *,
    target: Float[Array, ""],
    most: int,
    moves: int,
    fixed: int,
) -> Int32[Array, " E"]:
    """The counts of a walk that come closest to the target load of a GPU."""
    scaled = load * (2 * _LEVELS / target)  # what 2 w / T is, in levels
    level = jnp.arange(_LEVELS, dtype=jnp.int32)
    change, last = (jnp.asarray(x) for x in _moves(moves))
    parts = jnp.asarray(_parts(load.shape[0]))

    def position(scaled: Array, counts: Array) -> Array:
        """Of a replica: the number of levels below it, or minus the number it can pair with."""
        share = jnp.floor(scaled / jnp.maximum(counts, 1).astype(load.dtype))
        return jnp.clip(share, 0, 2 * _LEVELS + 1).astype(jnp.int32) - _LEVELS

    def excess(position: Array, counts: Array) -> Array:
        reached = level < jnp.abs(position)
        return jnp.where(reached, jnp.where(position > 0, counts, -counts), 0)

    def total_after(excess: Array, here: Array, new: Array, there: Array, old: Array) -> Array:
        """The sum of positive excesses if one expert goes from old to new, for each of a part.

        Some levels are added in one kernel, in registers; a reduction would store them all.
        """
        more, less = (jnp.where(x > 0, n, -n) for x, n in ((here, new), (there, old)))
        far, near = jnp.abs(here), jnp.abs(there)
        rows = excess.reshape(-1, _LEVELS_AT_ONCE)

        def add(i: Array, total: Array) -> Array:
            for k in range(_LEVELS_AT_ONCE):
                at = i * _LEVELS_AT_ONCE + k
                change = jnp.where(at < far, more, 0) - jnp.where(at < near, less, 0)
                total += jnp.maximum(rows[i, k] + change, 0)
            return total

        return lax.fori_loop(0, len(rows), add, jnp.zeros_like(here))

    def step(i: Array | int, walk: _Walk) -> _Walk:
        part = parts[jnp.asarray(i, jnp.int32) % len(parts)]
        load_of, old = scaled[part], walk.counts[part]
        new = old + change[i]
        here, there = position(load_of, new), position(load_of, old)
        cost = total_after(walk.excess, here, new, there, old)
        cost += jnp.where(here > _LEVELS, _TOO_LARGE, 0)
        invalid = walk.touched[part] | (new < 1) | (new > most)
        if fixed:
            invalid |= part >= load.shape[0] - fixed
        cost = jnp.where(invalid, _NEVER, cost)
        least = jnp.min(cost)
        one = first_equal(cost, least)

        possible = least < _NEVER
        chosen = possible & (jnp.arange(load.shape[0], dtype=jnp.int32) == part[one])
        counts = jnp.where(chosen, walk.counts + change[i], walk.counts)
        change_of_one = excess(here[one], new[one]) - excess(there[one], old[one])
        done = last[i]
        better = done & (least < walk.cost) & (jnp.sum(counts) == jnp.sum(walk.best))
        return _Walk(
            counts,
            walk.excess + jnp.where(possible, change_of_one, 0),
            (walk.touched | chosen) & ~done,
            jnp.where(better, counts, walk.best),
            jnp.where(better, least, walk.cost),
        )

    here = position(scaled, counts)
    signed = jnp.where(here > 0, counts, -counts)
    ends = jnp.zeros(_LEVELS + 2, jnp.int32).at[jnp.abs(here)].add(signed)
    at_first = jnp.cumsum(ends[::-1], dtype=jnp.int32)[::-1][1 : _LEVELS + 1]
    cost = jnp.sum(jnp.maximum(at_first, 0), dtype=jnp.int32)
    start = _Walk(counts, at_first, jnp.zeros(counts.shape, bool), counts, cost)
    return lax.fori_loop(0, len(change), step, start).best


def _parts(num_experts: int) -> np.ndarray:
    """Experts, by descending load, that a step considers: the largest, and every third other."""
    if num_experts < _ALL:
        return np.arange(num_experts, dtype=np.int32)[None]
    hot = num_experts // 8
    others = -(-(num_experts - hot) // 3)
    every_third = [np.resize(np.arange(hot + i, num_experts, 3), others) for i in range(3)]
    return np.array([[*range(hot), *x] for x in every_third], np.int32)


def _moves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The change of a count in every step, and which steps are the last of a move."""
    change, last = [], []
    for move in range(count):
        depth = _DEPTHS[move % len(_DEPTHS)]
        first = -1 if move // len(_DEPTHS) % 2 == 0 else 1
        change += [first] * depth + [-first] * depth
        last += [False] * (2 * depth - 1) + [True]
    return np.array(change, np.int32), np.array(last, bool)
