"""Bounds against the optimum of tiny instances, found by trying everything."""

import itertools

import jax
import numpy as np
import pytest

from eplb_jax import Topology, balanced_packing, packing_bound, plan_bound
from eplb_jax.evaluation.metrics import balance, gap
from tests.helpers import lognormal, pack_loads, packings


def kinds(layers, n, seed=0):
    """Loads of several kinds: uniform, skewed, few values, mostly zeros."""
    rng = np.random.default_rng(seed)
    drawn = [
        rng.uniform(size=(layers, n)),
        rng.lognormal(sigma=2, size=(layers, n)),
        rng.integers(0, 4, (layers, n)),
        rng.integers(1, 20, (layers, n)) * rng.integers(0, 2, (layers, n)),
    ]
    return np.concatenate(drawn).astype(np.float32)


@pytest.mark.parametrize(("n", "m"), [(6, 2), (8, 4), (9, 3), (10, 2), (12, 3)])
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


@pytest.mark.parametrize(("e", "r", "g"), [(4, 6, 3), (4, 8, 2), (3, 6, 2)])
def test_no_plan_undercuts_the_bound_of_plans(e, r, g):
    load = kinds(12, e, seed=r)
    optimum = np.full(len(load), np.inf)
    for counts in counts_of(e, r):
        items = np.repeat(load / counts, counts, axis=1)
        largest = items[:, packings(r, g)].sum(axis=3).max(axis=2).min(axis=1)
        optimum = np.minimum(optimum, largest)
    bound = np.asarray(plan_bound(load, Topology.of_replicas(r, g)))
    assert np.all(bound <= optimum * (1 + 2e-6))
    assert np.mean(bound >= optimum * 0.95) > 0.3


def test_bounds_of_plans_take_loads_of_any_number_of_axes():
    load, topology = kinds(12, 4), Topology(3, slots=2)
    bound = np.asarray(plan_bound(load, topology))
    windows = plan_bound(load.reshape(2, 24, 4), topology)
    np.testing.assert_array_equal(windows, bound.reshape(2, 24))
    one = plan_bound(load[5], topology)
    assert one.shape == ()
    assert one == bound[5]
    without_spare = plan_bound(load.reshape(2, 24, 4), Topology(2, slots=2))
    np.testing.assert_array_equal(without_spare, packing_bound(load, 2).reshape(2, 24))


def test_bounds_scale_and_hold_for_what_the_strategies_find():
    weight = lognormal(20, 64)
    bound = np.asarray(packing_bound(weight, 8))
    np.testing.assert_array_equal(packing_bound(weight * 2.0**40, 8), bound * 2.0**40)
    pack_index = balanced_packing(weight, 8, strategy="restarts").pack_index
    largest = pack_loads(weight, pack_index, 8).max(axis=1)
    assert np.all(largest >= bound * (1 - 2e-6))
    assert np.mean(largest / bound - 1) < 0.01
    assert packing_bound(np.zeros((2, 8)), 2).tolist() == [0, 0]
    assert packing_bound(np.zeros((0, 8)), 2).shape == (0,)


def test_gap_of_a_plan():
    load, topology = kinds(12, 4), Topology(3, slots=2)
    load[-1] = 0
    phy2log = np.tile([0, 1, 2, 3, 0, 1], (48, 1))
    gaps = np.asarray(gap(load, phy2log, topology))
    largest = np.asarray(balance(load, phy2log, topology).gpu_load).max(axis=1)
    idle, bound = load.sum(axis=1) == 0, np.asarray(plan_bound(load, topology))
    np.testing.assert_allclose(gaps[~idle], largest[~idle] / bound[~idle] - 1, atol=1e-6)
    assert np.all(gaps[idle] == 0)
    assert np.all(gaps >= -1e-6)


def test_bounds_under_jit_and_vmap():
    load, topology = kinds(12, 4), Topology(3, slots=2)
    for bound in (lambda w: packing_bound(w, 2), lambda w: plan_bound(w, topology)):
        stacked = jax.jit(jax.vmap(bound))(load.reshape(2, 24, 4))
        np.testing.assert_array_equal(stacked.reshape(48), bound(load))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_packs=5 does not divide number of items=12"):
        packing_bound(np.ones((1, 12)), 5)
    with pytest.raises(ValueError, match="topology has 6 slots for 8 experts; nearest: slots=3"):
        plan_bound(np.ones((1, 8)), Topology(3, slots=2))
    with pytest.raises(TypeError, match=r"topology must be an eplb_jax.Topology, got 4"):
        plan_bound(np.ones((1, 6)), 4)
