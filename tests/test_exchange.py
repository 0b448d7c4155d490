"""Exchanges in all packs at once, and the packings that they start from."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.packing.bounds import packing_bound
from eplb_jax.packing.columns import Columns
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.differencing import BestStart, differencing
from eplb_jax.packing.exchange import BITS
from eplb_jax.packing.exhaustive import every_packing, exhaustive, num_packings
from eplb_jax.packing.items import items_of
from eplb_jax.packing.pair_exchange import Pairs, schedule
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio
from tests.test_refinement import KEY, instance, jitted, lane_of

LANES = 8
construct = functools.partial(jax.jit, static_argnums=2)


def units_of(items):
    """The weights as exchanges of one window compare them."""
    return np.asarray(items.units, np.int64) >> (30 - BITS)


def duplicates_in(label, contents):
    """How many items have the label of another item of their pack, in every lane."""
    held = np.sort(np.take_along_axis(label[:, None], np.asarray(contents), 0), axis=1)
    return (held[:, 1:] == held[:, :-1]).sum(axis=(0, 1))


def some_labels(n, m, lanes=LANES):
    """Labels of runs of 1 to m items."""
    rng = np.random.default_rng(n)
    runs = [np.repeat(np.arange(n), rng.integers(1, m + 1, n))[:n] for _ in range(lanes)]
    return np.stack(runs, axis=-1).astype(np.int32)


def labelled_instance(m, c, labelled, seed=0):
    """Items, labels, and packings of them; each item has its own label if not `labelled`."""
    items, contents = instance(m, c, LANES, seed)
    if not labelled:
        return items, np.tile(np.arange(m * c)[:, None], LANES), contents
    label = some_labels(m * c, m)
    return items._replace(label=jnp.asarray(label)), label, contents


def test_the_schedule_of_six_packs():
    even, odd = [[0, 1, 2, 5, 4, 3], [0, 1, 2, 4, 3, 5]], [[0, 1, 2, 5, 4, 3], [1, 0, 3, 5, 2, 4]]
    np.testing.assert_array_equal(schedule(6, 4)[::2], even)
    np.testing.assert_array_equal(schedule(6, 4)[1::2], odd)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 9, 32])
def test_all_packs_are_paired_and_any_two_meet(m):
    half = m // 2
    rounds = schedule(m, 2 * (m + 1))
    np.testing.assert_array_equal(np.sort(rounds, axis=1), np.tile(np.arange(m), (len(rounds), 1)))
    first, second = rounds[:, :half], rounds[:, half : 2 * half]
    assert np.all(first < second)
    met = set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    assert met == set(itertools.combinations(range(m), 2))


@pytest.mark.parametrize(
    "refinement", [Columns(12), Pairs(6), Pairs(6, two=False), Peak(6)], ids=str
)
@pytest.mark.parametrize(("m", "c", "labelled"), [(5, 4, False), (5, 4, True), (2, 17, False)])
def test_items_are_kept_and_nothing_worsens(refinement, m, c, labelled):
    items, label, contents = labelled_instance(m, c, labelled)
    refined = np.asarray(jitted(refinement)(contents, items, KEY))
    flat = np.sort(refined.reshape(m * c, LANES), axis=0)
    np.testing.assert_array_equal(flat, np.tile(np.arange(m * c)[:, None], LANES))
    units = units_of(items)[:, None]
    before, after = (
        np.take_along_axis(units, np.asarray(x), 0).sum(axis=1) for x in (contents, refined)
    )
    assert np.any(after != before)
    if labelled and refinement.keeps_labels:
        assert np.all(duplicates_in(label, refined) <= duplicates_in(label, contents))
    else:
        assert np.all(after.max(axis=0) <= before.max(axis=0))
        if not isinstance(refinement, Peak):
            squares = [(x.astype(float) ** 2).sum(axis=0) for x in (after, before)]
            assert np.all(squares[0] <= squares[1])


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_round_makes_the_best_exchange_in_every_pair(two, labelled):
    items, labels, contents = labelled_instance(5, 4, labelled, seed=1)
    refined = np.asarray(jitted(Pairs(1, two))(contents, items, KEY))
    for lane in range(LANES):
        units, label = units_of(items)[:, lane], labels[:, lane]
        check_round(units, label, np.asarray(contents)[..., lane], refined[..., lane], two)


def check_round(units, label, packs, refined, two):
    """One round on five packs, against all exchanges of both pairs."""

    def duplicates(*packs):
        return duplicates_in(label[:, None], np.array(packs)[..., None])[0]

    order = sorted(range(len(packs)), key=lambda p: (-units[packs[p]].sum(), p))
    for a, b in zip(order[:2], order[:-3:-1], strict=True):
        a, b = packs[a].tolist(), packs[b].tolist()
        options = {(0, abs(units[a].sum() - units[b].sum()))}
        for size in (1, 2)[: 1 + two]:
            for out, into in itertools.product(*(itertools.combinations(x, size) for x in (a, b))):
                if np.isin(label[list(out)], label[b]).any():
                    continue
                if np.isin(label[list(into)], label[a]).any():
                    continue
                new_a = [x for x in a if x not in out] + list(into)
                new_b = [x for x in b if x not in into] + list(out)
                fewer = duplicates(a, b) > duplicates(new_a, new_b)
                options.add((-int(fewer), abs(units[new_a].sum() - units[new_b].sum())))
        best = min(options)
        made = [x for x in refined.tolist() if set(x) <= {*a, *b}]
        assert len(made) == 2
        if duplicates(a, b) == 0:
            assert abs(units[made[0]].sum() - units[made[1]].sum()) == best[1]
        else:
            assert duplicates(*made) <= duplicates(a, b) + best[0]


def test_a_step_lowers_the_most_loaded_pack_most():
    items, contents = instance(5, 4, seed=1)
    refined = np.asarray(jitted(Peak(1))(contents, items, KEY))
    for lane in range(LANES):
        units, packs = units_of(items)[:, lane], np.asarray(contents)[..., lane]
        loads = units[packs].sum(axis=1)
        a = int(loads.argmax())
        best = min(
            max(loads[a] - d, loads[b] + d)
            for b in range(5)
            if b != a
            for d in (units[packs[a]][:, None] - units[packs[b]]).ravel()
        )
        after = units[refined[..., lane]].sum(axis=1)
        changed = np.flatnonzero(after != loads)
        assert len(changed) == 2
        assert after[changed].max() == best


def test_the_largest_block_goes_to_the_least_rest():
    weight = jnp.asarray([1.75, 1.5, 1.25, 1.0, 0.5, 0.25], jnp.float32)
    contents = jnp.asarray([[0, 1], [2, 3], [4, 5]], jnp.int32)
    refined = jitted(Columns(9))(contents, items_of(weight, 3), KEY)
    np.testing.assert_allclose(np.sort(weight[refined].sum(axis=1)), [2.0, 2.0, 2.25])


def slow_differencing(weight, m):
    tuples = [[(weight[i], [i]) for i in range(k, k + m)] for k in range(0, len(weight), m)]
    while len(tuples) > 1:
        spread = [max(t)[0] - min(t)[0] for t in tuples]
        one = max(range(len(tuples)), key=lambda k: (spread[k], -k))
        other = max((k for k in range(len(tuples)) if k != one), key=lambda k: (spread[k], -k))
        most = sorted(tuples[one], key=lambda x: -x[0])
        least = sorted(tuples[other], key=lambda x: -x[0])[::-1]
        merged = [(x[0] + y[0], x[1] + y[1]) for x, y in zip(most, least, strict=True)]
        tuples[one] = merged
        del tuples[other]
    return sorted(load for load, _ in tuples[0])


def in_turn(n, lanes):
    return jnp.tile(jnp.arange(n, dtype=jnp.int32)[:, None], (1, lanes))


@pytest.mark.parametrize(("n", "m"), [(12, 6), (30, 5), (64, 8)])
def test_differencing_as_its_definition(n, m):
    items, _ = instance(m, n // m)
    contents, loads = construct(differencing)(items, in_turn(n, LANES), m)
    for lane in range(LANES):
        units = np.asarray(items.units, np.int64)[:, lane]
        packs = np.asarray(contents[..., lane])
        np.testing.assert_array_equal(np.sort(packs, axis=None), np.arange(n))
        assert np.sort(loads[:, lane]).tolist() == slow_differencing(units.tolist(), m)
        np.testing.assert_array_equal(loads[:, lane], units[packs].sum(axis=1))
        if n == 2 * m:  # the optimum is known: the largest item with the smallest
            assert units[packs].sum(axis=1).max() == (units + units[::-1]).max()


@pytest.mark.parametrize(("n", "m"), [(6, 3), (8, 2), (9, 3)])
def test_exhaustive_is_the_optimum(n, m):
    every = every_packing(n, m)
    distinct = {frozenset(map(frozenset, x)) for x in every.tolist()}
    assert len(every) == num_packings(n, m) == len(distinct)
    items, _ = instance(m, n // m)
    contents = construct(exhaustive)(items, in_turn(n, LANES), m).contents
    for lane in range(LANES):
        units = np.asarray(items.units, np.int64)[:, lane]
        largest = units[np.asarray(contents[..., lane])].sum(axis=1).max()
        assert largest == units[every].sum(axis=2).max(axis=1).min()
    if m == 2:
        start = construct(BestStart())(items, in_turn(n, LANES), m)
        np.testing.assert_array_equal(start.contents, contents)


def test_the_better_start_is_taken():
    skewed = 1.9 / np.arange(1, 33) ** 2
    uniform = -np.sort(-np.random.default_rng(0).uniform(size=32))
    items = items_of(jnp.asarray(np.stack([skewed, uniform], axis=1), jnp.float32), 8)
    starts = [
        construct(start)(items, in_turn(32, 2), 8).contents
        for start in (BestStart(), quantised_greedy, differencing)
    ]
    for lane in (0, 1):
        np.testing.assert_array_equal(starts[0][..., lane], starts[1 + lane][..., lane])
        assert not np.array_equal(starts[1][..., lane], starts[2][..., lane])


@pytest.mark.parametrize(
    ("m", "c", "most"), [(8, 9, 1e-3), (12, 4, 2e-2), (16, 3, 8e-2), (16, 2, 5e-2), (8, 20, 1e-3)]
)
def test_a_portfolio_reaches_the_bound_and_keeps_labels(m, c, most):
    label = np.arange(m * c) - (np.arange(m * c) % 8 == 1)  # every eighth item is there twice
    weight = np.random.default_rng(1).lognormal(sigma=0.5, size=m * c).astype(np.float32)[label]
    order = np.argsort(-weight, kind="stable")
    weight, label = weight[order], label[order].astype(np.int32)

    @jax.jit
    def search(weight, label):
        items = items_of(weight, m, label)
        start = BestStart()(items, jnp.arange(m * c, dtype=jnp.int32), m).contents
        return Portfolio(64, 16, 16)(start, items, KEY)

    refined = np.asarray(search(weight, label))
    assert duplicates_in(label[:, None], refined[..., None]) == 0
    largest = weight[refined].sum(axis=1).max()
    assert largest / packing_bound(weight[None], m)[0] - 1 < most


@pytest.mark.parametrize("refinement", [Columns(12), Pairs(6)], ids=str)
def test_lanes_are_refined_one_by_one(refinement):
    items, _, contents = labelled_instance(5, 4, labelled=True)
    many = jitted(refinement)(contents, items, KEY)
    for lane in range(3):
        alone = jitted(refinement)(contents[..., lane], lane_of(items, lane), KEY)
        np.testing.assert_array_equal(many[..., lane], alone)


def test_no_steps_change_nothing():
    items, contents = instance(5, 4)
    for refinement in (Columns(0), Pairs(0), Peak(0)):
        np.testing.assert_array_equal(jitted(refinement)(contents, items, KEY), contents)
