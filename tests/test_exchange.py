"""Exchanges in all packs at once, and the packings that they start from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_refinement import instance

from eplb_jax.packing import exchange, lanes
from eplb_jax.packing.bounds import packing_bound
from eplb_jax.packing.columns import Columns
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.differencing import BestStart, differencing
from eplb_jax.packing.exhaustive import every_packing, exhaustive, ways
from eplb_jax.packing.pair_exchange import Pairs, schedule
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio

KEY = jax.random.key(0)
best_start = BestStart()
ONE_PACKING = [Columns(12), Pairs(6), Pairs(6, two=False), Peak(6)]


def units_of(weight, capacity):
    integer = lanes.fixed_point(jnp.asarray(weight), capacity, exchange.BITS)
    return np.asarray(integer, np.int64)


def repeats_of(label, contents):
    """Repeats of every lane."""
    held = np.sort(np.asarray(label)[np.asarray(contents)], axis=1)
    return (held[:, 1:] == held[:, :-1]).sum(axis=(0, 1))


def some_labels(n, m, seed=0):
    """Labels of runs of 1 to m items."""
    sizes = np.random.default_rng(seed).integers(1, m + 1, n)
    return jnp.asarray(np.repeat(np.arange(n), sizes)[:n], jnp.int32)


def test_the_schedule_of_six_packs():
    even, odd = [[0, 1, 2, 5, 4, 3], [0, 1, 2, 4, 3, 5]], [[0, 1, 2, 5, 4, 3], [1, 0, 3, 5, 2, 4]]
    np.testing.assert_array_equal(schedule(6, 4)[::2], even)
    np.testing.assert_array_equal(schedule(6, 4)[1::2], odd)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 9, 32])
def test_all_packs_are_paired_and_any_two_meet(m):
    half = m // 2
    rounds = schedule(m, 2 * (m + 1))
    np.testing.assert_array_equal(np.sort(rounds, axis=1), np.tile(np.arange(m), (len(rounds), 1)))
    heavy, light = rounds[:, :half], rounds[:, half : 2 * half]
    assert np.all(heavy < light)
    met = set(zip(heavy.ravel().tolist(), light.ravel().tolist(), strict=True))
    assert met == set(itertools.combinations(range(m), 2))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("refinement", ONE_PACKING, ids=str)
@pytest.mark.parametrize(("m", "c"), [(2, 9), (3, 1), (5, 4), (3, 17)])
def test_items_are_kept_and_nothing_worsens(refinement, m, c, labelled):
    weight, contents = instance(m, c, count=1)
    label = some_labels(m * c, m) if labelled else None
    refined = np.asarray(jax.jit(refinement)(contents[..., 0], weight, KEY, label))
    np.testing.assert_array_equal(np.sort(refined, axis=None), np.arange(m * c))
    units = units_of(weight, c)
    before, after = (units[np.asarray(x)].sum(axis=1) for x in (contents[..., 0], refined))
    if labelled and not isinstance(refinement, Columns):
        assert repeats_of(label, refined) <= repeats_of(label, contents[..., 0])
    else:
        assert after.max() <= before.max()
        if not isinstance(refinement, Peak):
            assert (after.astype(float) ** 2).sum() <= (before.astype(float) ** 2).sum()


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_round_makes_the_best_exchange_in_every_pair(two, labelled, seed):
    m, c = 5, 4
    weight, contents = instance(m, c, seed, count=1)
    contents = contents[..., 0]
    label = np.asarray(some_labels(m * c, m, seed)) if labelled else np.arange(m * c)
    marks = jnp.asarray(label, jnp.int32) if labelled else None
    refined = np.asarray(jax.jit(Pairs(1, two))(contents, weight, KEY, marks))
    units, packs = units_of(weight, c), np.asarray(contents)
    order = sorted(range(m), key=lambda p: (-units[packs[p]].sum(), p))
    for a, b in zip(order[:2], order[:-3:-1], strict=True):
        a, b = packs[a].tolist(), packs[b].tolist()
        urgent = repeats_of(label, np.array([a, b])) > 0
        options = {(0, abs(units[a].sum() - units[b].sum()))}
        for size in (1, 2)[: 1 + two]:
            for out, into in itertools.product(*(itertools.combinations(x, size) for x in (a, b))):
                new_a = [x for x in a if x not in out] + list(into)
                new_b = [x for x in b if x not in into] + list(out)
                brings = np.isin(label[list(out)], label[b]) | np.isin(label[list(into)], label[a])
                if not brings.any():
                    apart = abs(units[new_a].sum() - units[new_b].sum())
                    fewer = repeats_of(label, np.array([a, b])) - repeats_of(
                        label, np.array([new_a, new_b])
                    )
                    options.add((-int(fewer > 0), apart))
        best = min(options)
        made = [x for x in refined.tolist() if set(x) <= {*a, *b}]
        loads = [units[x].sum() for x in made]
        assert len(loads) == 2
        if not urgent:
            assert abs(loads[0] - loads[1]) == best[1]
        else:
            left = repeats_of(label, np.array(made))
            assert left <= repeats_of(label, np.array([a, b])) + best[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_step_lightens_the_heaviest_pack_most(seed):
    m, c = 6, 4
    weight, contents = instance(m, c, seed, count=1)
    contents = contents[..., 0]
    units, packs = units_of(weight, c), np.asarray(contents)
    loads = units[packs].sum(axis=1)
    a = int(loads.argmax())
    best = min(
        max(loads[a] - d, loads[b] + d)
        for b in range(m)
        if b != a
        for d in (units[packs[a]][:, None] - units[packs[b]]).ravel()
    )
    after = units[np.asarray(Peak(1)(contents, weight, KEY))].sum(axis=1)
    changed = np.flatnonzero(after != loads)
    assert len(changed) == 2
    assert after[changed].max() == best


def test_blocks_go_to_the_lightest_rests():
    weight = jnp.asarray([1.75, 1.5, 1.25, 1.0, 0.5, 0.25], jnp.float32)
    contents = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.int32)
    loads = np.asarray(weight)[np.asarray(Columns(9)(contents, weight, KEY))].sum(axis=1)
    np.testing.assert_allclose(np.sort(loads), [2.0, 2.0, 2.25])


def slow_differencing(weight, m):
    tuples = [[(weight[i], [i]) for i in range(k, k + m)] for k in range(0, len(weight), m)]
    while len(tuples) > 1:
        spread = [max(t)[0] - min(t)[0] for t in tuples]
        one = max(range(len(tuples)), key=lambda k: (spread[k], -k))
        other = max((k for k in range(len(tuples)) if k != one), key=lambda k: (spread[k], -k))
        heavy = sorted(tuples[one], key=lambda x: -x[0])
        light = sorted(tuples[other], key=lambda x: -x[0])[::-1]
        merged = [(x[0] + y[0], x[1] + y[1]) for x, y in zip(heavy, light, strict=True)]
        tuples[one] = merged
        del tuples[other]
    return sorted(load for load, _ in tuples[0])


@pytest.mark.parametrize(("n", "m"), [(6, 3), (12, 3), (12, 6), (30, 5), (64, 8), (288, 32)])
def test_differencing_as_its_definition(n, m):
    weight, _ = instance(m, n // m)
    contents, loads = differencing(weight, jnp.arange(n, dtype=jnp.int32), m)
    np.testing.assert_array_equal(np.sort(contents, axis=None), np.arange(n))
    integer = np.asarray(lanes.fixed_point(weight, n // m, lanes.LOAD_BITS), np.int64)
    assert np.sort(loads).tolist() == slow_differencing(integer.tolist(), m)
    np.testing.assert_array_equal(loads, integer[np.asarray(contents)].sum(axis=1))
    if n == 2 * m:
        bound = packing_bound(np.asarray(weight)[None], m)[0]
        assert np.asarray(weight)[np.asarray(contents)].sum(axis=1).max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(("n", "m"), [(4, 2), (6, 3), (8, 2), (8, 4), (9, 3)])
def test_exhaustive_is_the_optimum(n, m):
    every = every_packing(n, m)
    assert len(every) == ways(n, m) == len({frozenset(map(frozenset, x)) for x in every.tolist()})
    weight, _ = instance(m, n // m)
    lpt = jnp.arange(n, dtype=jnp.int32)
    contents = exhaustive(weight, lpt, m).contents
    loads = np.asarray(weight)[np.asarray(contents)].sum(axis=1)
    assert loads.max() == np.asarray(weight)[every].sum(axis=2).max(axis=1).min()
    np.testing.assert_array_equal(best_start(weight, lpt, m).contents, contents)


def test_the_better_start_is_taken():
    order = jnp.arange(32, dtype=jnp.int32)
    skewed = jnp.asarray(1.9 / np.arange(1, 33) ** 2, jnp.float32)
    even = jnp.asarray(np.linspace(1.9, 1, 32) ** 2 / 2, jnp.float32)
    for weight, winner in ((skewed, quantised_greedy), (even, differencing)):
        np.testing.assert_array_equal(
            best_start(weight, order, 8).contents, winner(weight, order, 8).contents
        )


@pytest.mark.parametrize(("m", "c"), [(8, 9), (12, 4), (16, 3), (16, 2), (8, 20)])
def test_a_portfolio_reaches_the_bound_and_keeps_labels(m, c):
    rng = np.random.default_rng(1)
    label = np.arange(m * c) - (np.arange(m * c) % 8 == 1)  # every eighth item is there twice
    by_label = rng.lognormal(sigma=0.5, size=m * c)
    weight = by_label[label]
    order = np.argsort(-weight, kind="stable")
    weight = (weight[order] / 2 ** np.floor(np.log2(weight.max()))).astype(np.float32)
    marks = jnp.asarray(label[order], jnp.int32)
    lpt = jnp.arange(m * c, dtype=jnp.int32)
    start = best_start(jnp.asarray(weight), lpt, m).contents
    refined = jax.jit(Portfolio(64, 16, 16))(start, jnp.asarray(weight), KEY, marks)
    assert repeats_of(marks, refined) == 0
    heaviest = weight[np.asarray(refined)].sum(axis=1).max()
    gap = heaviest / packing_bound(weight[None], m)[0] - 1
    assert gap < {9: 1e-3, 4: 2e-2, 3: 8e-2, 2: 5e-2, 20: 1e-3}[c]


def test_lanes_are_refined_one_by_one():
    weight, contents = instance(5, 4, count=3)
    portfolio = jax.jit(Portfolio(4, 3, 2))
    many = portfolio(contents, weight, KEY, some_labels(20, 3))
    for lane in range(3):
        alone = portfolio(contents[..., lane], weight, KEY, some_labels(20, 3))
        np.testing.assert_array_equal(many[..., lane], alone)
