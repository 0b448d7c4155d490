"""Counts of replicas for GPUs of two and three slots, against trying all of them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lognormal, repeats

import eplb_jax
from eplb_jax import joint
from eplb_jax.joint import JointCounts

SEARCH = JointCounts(targets=8, moves=12, divisors=3)


def folded(load, counts):
    """The heaviest pair of the fold, in float64."""
    falling = np.sort(np.repeat(np.asarray(load, float) / counts, counts))[::-1]
    return (falling + falling[::-1]).max()


def searched(load, num_replicas, search=SEARCH, most=None):
    load = jnp.asarray(load, jnp.float32)
    load = load / load.max(axis=1, keepdims=True)
    return np.asarray(search.candidates(load, num_replicas, num_replicas // 2, most))[:, 0]


def greedy(load, num_replicas):
    return np.asarray(eplb_jax.replicate_experts(load, num_replicas).logcnt)


def all_counts(num_experts, num_replicas):
    for cuts in itertools.combinations(range(1, num_replicas), num_experts - 1):
        yield np.diff([0, *cuts, num_replicas])


def test_where_greedy_counts_cost_a_fifth():
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    optimum = min(folded(load[0], counts) for counts in all_counts(8, 16))
    assert optimum == pytest.approx(196.667, abs=1e-3)
    for strategy, reached in (("greedy", 232), ("auto", optimum), ("best", optimum)):
        plan = eplb_jax.rebalance_experts(load, 16, 1, 1, 8, strategy=strategy)
        heaviest = eplb_jax.metrics.balance(load, plan, 8).gpu_load.max()
        assert heaviest == pytest.approx(reached, rel=1e-5)
        assert strategy == "greedy" or repeats(plan.phy2log, 8).sum() == 0


@pytest.mark.parametrize(("e", "r"), [(5, 8), (6, 10), (6, 12), (7, 12)])
def test_most_of_the_way_to_the_optimum(e, r):
    rng = np.random.default_rng(e + r)
    load = np.concatenate([rng.lognormal(size=(30, e)), rng.uniform(size=(30, e))])
    counts, before = searched(load, r), greedy(load, r)
    assert np.all(counts.sum(axis=1) == r)
    assert counts.min() >= 1
    ways = list(all_counts(e, r))
    optimum = np.array([min(folded(x, counts) for counts in ways) for x in load])
    reached = np.array([folded(x, c) for x, c in zip(load, counts, strict=True)])
    at_first = np.array([folded(x, c) for x, c in zip(load, before, strict=True)])
    assert np.all(reached <= at_first * (1 + 1e-5))
    assert (at_first - reached).sum() > 0.75 * (at_first - optimum).sum()
    assert np.mean(at_first > optimum * 1.001) > 0.1  # there was something to gain


@pytest.mark.parametrize("spares", [32, 64])
def test_counts_of_many_experts_fold_better(spares):
    load = lognormal(6, 256, sigma=0.5)
    counts, before = searched(load, 256 + spares), greedy(load, 256 + spares)
    mean = 2 * load.sum(axis=1) / (256 + spares)
    gained = [folded(x, b) - folded(x, c) for x, b, c in zip(load, before, counts, strict=True)]
    assert np.all(np.array(gained) >= -1e-6)
    assert np.mean(gained / mean) > 0.015


def test_no_expert_gets_more_than_there_are_gpus():
    load = np.array([[1000.0, *[1] * 9]])
    plan = eplb_jax.rebalance_experts(load, 16, 1, 1, 8)
    assert plan.logcnt.max() <= 8
    np.testing.assert_array_equal(repeats(plan.phy2log, 8), 0)


def test_with_three_slots_the_counts_that_pack_best():
    load = lognormal(12, 64)
    auto = eplb_jax.STRATEGIES["auto"]
    one = dataclasses.replace(auto, counts=dataclasses.replace(SEARCH, divisors=1))
    plain = dataclasses.replace(auto, counts=None)
    plans = [eplb_jax.rebalance_experts(load, 72, 1, 1, 24, strategy=x) for x in (plain, one, auto)]
    heaviest = [
        np.asarray(eplb_jax.metrics.balance(load, p, 24).gpu_load).max(axis=1) for p in plans
    ]
    np.testing.assert_array_equal(heaviest[0], heaviest[1])
    assert np.all(heaviest[2] <= heaviest[1] * (1 + 1e-6))
    assert heaviest[2].sum() < heaviest[1].sum()


def test_a_load_that_stays_one_compilation():
    load = jnp.asarray(lognormal(2, 32))
    plan = lambda load: eplb_jax.rebalance_experts(load, 40, 1, 1, 20).phy2log  # noqa: E731
    expected = plan(load)
    np.testing.assert_array_equal(jax.jit(plan)(load), expected)
    one_by_one = np.concatenate([plan(x[None]) for x in load])
    np.testing.assert_array_equal(one_by_one, expected)


def test_moves_and_parts():
    change, last = joint._moves(4)
    assert change.tolist() == [-1, 1, -1, -1, 1, 1, -1, -1, -1, 1, 1, 1, 1, -1]
    assert np.flatnonzero(last).tolist() == [1, 5, 11, 13]
    assert joint._parts(5).tolist() == [[0, 1, 2, 3, 4]]
    parts = joint._parts(256)
    assert all(row[:32].tolist() == list(range(32)) for row in parts)
    assert set(parts.ravel().tolist()) == set(range(256))
