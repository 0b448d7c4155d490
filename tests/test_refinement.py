import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lognormal

from eplb_jax.packing import lanes
from eplb_jax.packing.rebuild import Rebuild
from eplb_jax.packing.swaps import Swap

KEY = jax.random.key(0)
REFINEMENTS = [
    Swap(1),
    Swap(20),
    Swap(20, light=None),
    Swap(20, heavy=4, light=4),
    Swap(20, pairs=True),
    Swap(5, heavy=2, light=3, pairs=True),
    Rebuild(5),
    Rebuild(10, attempts=15, low=0.8, high=1.2),
    Rebuild(10, attempts=15, low=0.8, high=1.2, third=True),
]


def instance(m, c, seed=0, count=4):
    """Falling weights whose largest lies in [1, 2), and random packings of them as lanes."""
    weight = -np.sort(-lognormal(1, m * c, seed=seed)[0])
    weight = (weight / 2 ** np.floor(np.log2(weight[0]))).astype(np.float32)
    rng = np.random.default_rng(seed)
    items = rng.permuted(np.tile(np.arange(m * c), (count, 1)), axis=1).T
    return jnp.asarray(weight), jnp.asarray(items.reshape(m, c, count), jnp.int32)


def loads_of(weight, contents):
    integer = np.asarray(lanes.fixed_point(weight, contents.shape[1], lanes.LOAD_BITS), np.int64)
    return integer[np.asarray(contents)].sum(axis=1)


@pytest.mark.parametrize("refinement", REFINEMENTS, ids=str)
@pytest.mark.parametrize(("m", "c"), [(2, 2), (2, 9), (3, 1), (5, 4), (8, 3)])
def test_a_refinement_keeps_every_item_and_never_worsens(refinement, m, c):
    weight, contents = instance(m, c)
    refined = jax.jit(refinement)(contents, weight, KEY)
    flat = np.sort(np.asarray(refined).reshape(m * c, -1), axis=0)
    np.testing.assert_array_equal(flat, np.arange(m * c)[:, None] * np.ones((1, 4), int))
    before, after = loads_of(weight, contents), loads_of(weight, refined)
    assert np.all(after.max(axis=0) <= before.max(axis=0))
    assert np.all((after.astype(float) ** 2).sum(0) <= (before.astype(float) ** 2).sum(0))


@pytest.mark.parametrize("refinement", REFINEMENTS, ids=str)
def test_lanes_are_independent_and_one_candidate_needs_none(refinement):
    weight, contents = instance(5, 4)
    refine = jax.jit(refinement)
    refined = refine(contents, weight, KEY)
    for lane in range(4):
        alone = refine(contents[..., lane], weight, KEY)
        np.testing.assert_array_equal(alone, refined[..., lane])


@pytest.mark.parametrize("refinement", REFINEMENTS, ids=str)
@pytest.mark.parametrize("weight", [np.zeros(12), np.ones(12)], ids=["zero", "equal"])
def test_a_balanced_packing_is_left_as_it_is(refinement, weight):
    contents = jnp.arange(12, dtype=jnp.int32).reshape(3, 4, 1)
    refined = refinement(contents, jnp.asarray(weight, jnp.float32), KEY)
    np.testing.assert_array_equal(np.sort(refined, axis=1), contents)


def exchanges(loads, weight, contents, heavy, light, pairs):
    """(gain, packs, items) of every exchange, by trying each one."""
    m, c = contents.shape
    falling = sorted(range(m), key=lambda p: (-loads[p], p))
    rising = sorted(range(m), key=lambda p: (loads[p], p))
    groups = [(i,) for i in range(c)]
    sizes = [groups, list(itertools.combinations(range(c), 2))] if pairs else [groups]
    for a, b in itertools.product(falling[:heavy], rising[: light or m]):
        for size in sizes:
            for out, into in itertools.product(size, size):
                d = sum(weight[contents[a, i]] for i in out) - sum(
                    weight[contents[b, j]] for j in into
                )
                before = loads[a] ** 2 + loads[b] ** 2
                after = (loads[a] - d) ** 2 + (loads[b] + d) ** 2
                if a != b:
                    yield before - after


@pytest.mark.parametrize("swap", [s for s in REFINEMENTS if isinstance(s, Swap)], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_one_step_makes_the_exchange_that_lowers_the_squares_most(swap, seed):
    weight, contents = instance(6, 4, seed)
    one = Swap(1, swap.heavy, swap.light, swap.pairs)
    integer = [int(x) for x in np.asarray(lanes.fixed_point(weight, 4, lanes.LOAD_BITS))]
    refined = np.asarray(jax.jit(one)(contents, weight, KEY))
    for lane in range(contents.shape[2]):
        start = np.asarray(contents[..., lane])
        loads = [sum(integer[i] for i in row) for row in start]
        best = max(exchanges(loads, integer, start, one.heavy, one.light, one.pairs))
        after = [sum(integer[i] for i in row) for row in refined[..., lane]]
        gained = sum(x * x for x in loads) - sum(x * x for x in after)
        # Gains are compared in float32.
        assert gained == pytest.approx(max(best, 0), rel=1e-5)


def test_swaps_find_the_optimum_where_one_exchange_is_missing():
    weight = jnp.asarray([1.5, 1.25, 1.0, 0.75, 0.5, 0.25], jnp.float32)
    contents = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.int32)
    loads = np.asarray(weight)[np.asarray(Swap(3)(contents, weight, KEY))].sum(axis=1)
    np.testing.assert_allclose(loads, 1.75)


def test_two_for_two_gets_further_than_one_for_one():
    better = 0
    swap, swap_pairs = jax.jit(Swap(60)), jax.jit(Swap(60, pairs=True))
    for seed in range(8):
        weight, contents = instance(8, 9, seed)
        single = loads_of(weight, swap(contents, weight, KEY)).max(axis=0)
        pairs = loads_of(weight, swap_pairs(contents, weight, KEY)).max(axis=0)
        better += np.sum(pairs < single)
    assert better >= 28  # of 32


def test_rebuilding_with_a_third_pack_touches_other_packs_too():
    weight, contents = instance(6, 4, count=1)
    two = Rebuild(1, attempts=15, low=0.8, high=1.2)(contents, weight, KEY)
    three = Rebuild(2, attempts=15, low=0.8, high=1.2, third=True)(contents, weight, KEY)
    start = np.sort(contents[..., 0], axis=1)
    changed = [int((np.sort(x[..., 0], axis=1) != start).any(axis=1).sum()) for x in (two, three)]
    assert changed[0] == 2
    assert changed[1] >= 3


def test_rebuilding_depends_on_the_key_only_through_noise():
    weight, contents = instance(8, 9)
    noisy = jax.jit(Rebuild(20, attempts=4, low=0.8, high=1.2))
    same = noisy(contents, weight, jax.random.key(0))
    np.testing.assert_array_equal(same, noisy(contents, weight, KEY))
    assert not jnp.array_equal(same, noisy(contents, weight, jax.random.key(1)))
    plain = jax.jit(Rebuild(20))
    np.testing.assert_array_equal(
        plain(contents, weight, KEY), plain(contents, weight, jax.random.key(1))
    )
