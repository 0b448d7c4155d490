"""Counts of replicas for GPUs of two and three slots, against trying all of them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lognormal, repeats
from test_bounds import packings

import eplb_jax
from eplb_jax.planning import replica_counts as joint

AUTO = eplb_jax.STRATEGIES["auto"]
PLAIN = dataclasses.replace(AUTO, counts=None)


def folded(load, counts):
    """The heaviest pair of the fold, in float64."""
    falling = np.sort(np.repeat(np.asarray(load, float) / counts, counts))[::-1]
    return (falling + falling[::-1]).max()


def heaviest(load, num_replicas, strategy):
    """Of the GPUs of a plan, which must be a plan without repeats."""
    num_gpus = num_replicas // 2
    plan = eplb_jax.rebalance_experts(load, num_replicas, 1, 1, num_gpus, strategy=strategy)
    eplb_jax.check_placement(plan)
    np.testing.assert_array_equal(repeats(plan.phy2log, num_gpus), 0)
    return np.asarray(eplb_jax.metrics.balance(load, plan, num_gpus).gpu_load).max(axis=1)


def all_counts(num_experts, num_replicas):
    for cuts in itertools.combinations(range(1, num_replicas), num_experts - 1):
        yield np.diff([0, *cuts, num_replicas])


def test_where_greedy_counts_cost_a_fifth():
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    optimum = min(folded(load[0], counts) for counts in all_counts(8, 16))
    assert optimum == pytest.approx(196.667, abs=1e-3)
    greedy = eplb_jax.rebalance_experts(load, 16, 1, 1, 8, strategy="greedy")
    assert eplb_jax.metrics.balance(load, greedy, 8).gpu_load.max() == 232
    assert heaviest(load, 16, "auto") == pytest.approx(optimum, rel=1e-6)
    assert heaviest(load, 16, "best") == pytest.approx(optimum, rel=1e-6)


def optima(load, num_replicas):
    """The lightest heaviest GPU of any plan without repeats, by trying all plans."""
    pairs = packings(num_replicas, num_replicas // 2)
    best = np.full(len(load), np.inf)
    for counts in all_counts(load.shape[1], num_replicas):
        held = np.repeat(np.arange(load.shape[1]), counts)[pairs]
        apart = pairs[np.all(held[:, :, 0] != held[:, :, 1], axis=1)]
        if len(apart):
            items = np.repeat(load / counts, counts, axis=1)
            best = np.minimum(best, items[:, apart].sum(axis=3).max(axis=2).min(axis=1))
    return best


@pytest.mark.parametrize(("e", "r"), [(6, 10)])
def test_most_of_the_way_to_the_optimum(e, r):
    rng = np.random.default_rng(e + r)
    load = np.concatenate([rng.lognormal(size=(30, e)), rng.uniform(size=(30, e))])
    before, reached = heaviest(load, r, PLAIN), heaviest(load, r, "auto")
    optimum = optima(load, r)
    assert np.all(reached <= before * (1 + 1e-5))
    assert np.all(reached >= optimum * (1 - 1e-5))
    assert (before - reached).sum() > 0.75 * (before - optimum).sum()
    assert np.mean(before > optimum * 1.001) > 0.1  # there was something to gain


def test_counts_of_many_experts_fold_better():
    load = lognormal(6, 256, sigma=0.5)
    before, reached = (heaviest(load, 320, x) for x in (PLAIN, "auto"))
    assert np.all(reached <= before * (1 + 1e-5))
    assert np.mean((before - reached) / load.sum(axis=1)) * 160 > 0.015


def test_no_expert_gets_more_than_there_are_gpus():
    load = np.array([[1000.0, *[1] * 9]])
    plan = eplb_jax.rebalance_experts(load, 16, 1, 1, 8)
    assert plan.logcnt.max() <= 8
    np.testing.assert_array_equal(repeats(plan.phy2log, 8), 0)


def test_with_three_slots_the_counts_that_pack_best():
    load = lognormal(12, 64)
    one = dataclasses.replace(AUTO, counts=dataclasses.replace(AUTO.counts, divisors=1))
    plans = [eplb_jax.rebalance_experts(load, 72, 1, 1, 24, strategy=x) for x in (PLAIN, one, AUTO)]
    loads = [np.asarray(eplb_jax.metrics.balance(load, plan, 24).gpu_load) for plan in plans]
    plain, one, three = (x.max(axis=1) for x in loads)
    np.testing.assert_array_equal(plain, one)
    assert np.all(three <= one * (1 + 1e-6))
    assert three.sum() < one.sum()


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
