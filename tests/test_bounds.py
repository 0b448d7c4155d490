"""Bounds against the optimum of tiny instances, found by trying everything."""

import functools
import itertools

import jax
import numpy as np
import pytest
from helpers import lognormal

from eplb_jax import balanced_packing, packing_bound, plan_bound, rebalance_experts
from eplb_jax.evaluation.metrics import balance, gap


def kinds(layers, n, seed=0):
    """Loads of several kinds: even, skewed, few values, mostly zeros."""
    rng = np.random.default_rng(seed)
    drawn = [
        rng.uniform(size=(layers, n)),
        rng.lognormal(sigma=2, size=(layers, n)),
        rng.integers(0, 4, (layers, n)),
        rng.integers(1, 20, (layers, n)) * rng.integers(0, 2, (layers, n)),
    ]
    return np.concatenate(drawn).astype(np.float32)


@functools.cache
def packings(n, m):
    """Every way to fill m packs alike, [ways, m, n / m]."""

    def ways(items):
        if not items:
            yield ()
            return
        for rest in itertools.combinations(items[1:], n // m - 1):
            left = [x for x in items[1:] if x not in rest]
            for others in ways(left):
                yield ((items[0], *rest), *others)

    return np.array(list(ways(tuple(range(n)))))


@pytest.mark.parametrize(
    ("n", "m"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3), (10, 5), (10, 2), (12, 6), (12, 3)]
)
def test_no_packing_undercuts_the_bound(n, m):
    weight = kinds(50, n, seed=n)
    optimum = np.array([w[packings(n, m)].sum(axis=2).max(axis=1).min() for w in weight])
    bound = np.asarray(packing_bound(weight, m))
    assert np.all(bound <= optimum * (1 + 2e-6))
    tight = np.mean(bound >= optimum * (1 - 1e-6))
    assert tight == 1 if n == 2 * m else tight > 0.4


def test_every_part_of_the_bound_is_needed():
    cases = {
        "mean": ([1, 1, 1, 1], 2, 2),
        "largest and smallest": ([9, 1, 2, 3], 2, 10),
        "two of three share a pack": ([5, 5, 5, 1, 1, 1], 2, 11),
        "five of four packs' first": ([6, 6, 6, 6, 6, 0, 0, 0], 4, 12),
    }
    for weight, m, bound in cases.values():
        assert packing_bound([weight], m).tolist() == [bound]


def counts_of(num_experts, num_replicas):
    for extra in itertools.combinations_with_replacement(
        range(num_experts), num_replicas - num_experts
    ):
        yield 1 + np.bincount(extra, minlength=num_experts)


@pytest.mark.parametrize(("e", "r", "g"), [(4, 6, 3), (4, 8, 2), (5, 6, 2), (3, 6, 2), (6, 8, 4)])
def test_no_plan_undercuts_the_bound_of_plans(e, r, g):
    load = kinds(12, e, seed=r)
    optimum = np.full(len(load), np.inf)
    for counts in counts_of(e, r):
        items = np.repeat(load / counts, counts, axis=1)
        heaviest = items[:, packings(r, g)].sum(axis=3).max(axis=2).min(axis=1)
        optimum = np.minimum(optimum, heaviest)
    bound = np.asarray(plan_bound(load, r, g))
    assert np.all(bound <= optimum * (1 + 2e-6))
    assert np.mean(bound >= optimum * 0.95) > 0.3


def test_bounds_scale_and_hold_for_what_the_strategies_find():
    weight = lognormal(20, 64)
    bound = np.asarray(packing_bound(weight, 8))
    np.testing.assert_array_equal(packing_bound(weight * 2.0**40, 8), bound * 2.0**40)
    pack = np.asarray(balanced_packing(weight, 8, strategy="lns").pack_index)
    heaviest = np.max([np.where(pack == p, weight, 0).sum(axis=1) for p in range(8)], axis=0)
    assert np.all(heaviest >= bound * (1 - 2e-6))
    assert np.mean(heaviest / bound - 1) < 0.01
    assert packing_bound(np.zeros((2, 8)), 2).tolist() == [0, 0]
    assert packing_bound(np.zeros((0, 8)), 2).shape == (0,)


def test_gap_of_a_plan():
    load = np.concatenate([lognormal(3, 32), np.zeros((1, 32))])
    plan = rebalance_experts(load, 48, 4, 2, 8)
    gaps = np.asarray(gap(load, plan, 8))
    heaviest = np.asarray(balance(load, plan, 8).gpu_load).max(axis=1)
    np.testing.assert_allclose(gaps[:3], heaviest[:3] / np.asarray(plan_bound(load, 48, 8))[:3] - 1)
    assert gaps[3] == 0
    assert np.all(gaps >= -1e-6)


def test_bounds_under_jit_and_vmap():
    weight = lognormal(6, 24)
    expected = np.asarray(packing_bound(weight, 4))
    np.testing.assert_array_equal(jax.jit(lambda w: packing_bound(w, 4))(weight), expected)
    stacked = jax.vmap(lambda w: packing_bound(w, 4))(weight.reshape(2, 3, 24))
    np.testing.assert_array_equal(stacked.reshape(6), expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_packs=5 does not divide number of items=12"):
        packing_bound(np.ones((1, 12)), 5)
    with pytest.raises(ValueError, match="num_replicas=7 is not a multiple of num_gpus=3"):
        plan_bound(np.ones((1, 6)), 7, 3)
