"""Replica counts for GPUs of two and three slots, against trying all of them."""

import dataclasses
import itertools

import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology
from tests.helpers import duplicates, lognormal, packings

AUTO = eplb_jax.STRATEGIES["auto"]
PLAIN = dataclasses.replace(AUTO, counts=None)


def fold(load, counts):
    """The maximum load of a pair in the fold, in float64."""
    share = np.sort(np.repeat(np.asarray(load, float) / counts, counts))
    return (share + share[::-1]).max()


def max_load(load, num_replicas, strategy):
    """The maximum GPU load of a plan, which must have no duplicates."""
    topology = Topology(num_replicas // 2, slots=2)
    plan = eplb_jax.plan(load, topology, strategy=strategy)
    eplb_jax.check_placement(plan)
    np.testing.assert_array_equal(duplicates(plan.phy2log, topology.num_gpus), 0)
    return np.asarray(eplb_jax.metrics.balance(load, plan, topology).gpu_load).max(axis=1)


def all_counts(num_experts, num_replicas):
    for cuts in itertools.combinations(range(1, num_replicas), num_experts - 1):
        yield np.diff([0, *cuts, num_replicas])


def test_where_greedy_counts_cost_a_fifth():
    load = [[600, 560, 120, 120, 20, 10, 10, 10]]
    optimum = min(fold(load[0], counts) for counts in all_counts(8, 16))
    assert optimum == pytest.approx(196.667, abs=1e-3)
    greedy = eplb_jax.plan(load, Topology(8, slots=2), strategy="greedy")
    balance = eplb_jax.metrics.balance(load, greedy, Topology(8, slots=2))
    assert balance.gpu_load.max() == 232
    assert max_load(load, 16, "auto") == pytest.approx(optimum, rel=1e-6)
    assert max_load(load, 16, "best") == pytest.approx(optimum, rel=1e-6)


def optima(load, num_replicas):
    """The least maximum GPU load of any plan without duplicates, by trying all plans."""
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
    before, reached = max_load(load, r, PLAIN), max_load(load, r, "auto")
    optimum = optima(load, r)
    assert np.all(reached <= before * (1 + 1e-5))
    assert np.all(reached >= optimum * (1 - 1e-5))
    assert (before - reached).sum() > 0.75 * (before - optimum).sum()
    assert np.mean(before > optimum * 1.001) > 0.1  # there was something to gain


def test_where_only_greedy_counts_pack_without_duplicates():
    """Other counts have the better fold, but with these few experts none without duplicates."""
    load = np.array([[18, 8, 19, 8, 19, 1], [11, 2, 8, 2, 13, 13], [19, 19, 6, 9, 4, 16]])
    np.testing.assert_array_equal(max_load(load, 8, "auto"), [19, 13, 20])


@pytest.mark.quality
def test_counts_of_many_experts_fold_better():
    load = lognormal(6, 256, sigma=0.5)
    before, reached = (max_load(load, 320, x) for x in (PLAIN, "auto"))
    assert np.all(reached <= before * (1 + 1e-5))
    assert np.mean((before - reached) / load.sum(axis=1)) * 160 > 0.015


def test_no_expert_gets_more_than_there_are_gpus():
    load = np.array([[1000.0, *[1] * 9]])
    plan = eplb_jax.plan(load, Topology(8, slots=2))
    assert plan.logcnt.max() <= 8
    np.testing.assert_array_equal(duplicates(plan.phy2log, 8), 0)


@pytest.mark.quality
def test_with_three_slots_the_counts_that_pack_best():
    load = lognormal(12, 64)
    one = dataclasses.replace(AUTO, counts=dataclasses.replace(AUTO.counts, divisors=1))
    topology = Topology(24, slots=3)
    plans = [eplb_jax.plan(load, topology, strategy=x) for x in (PLAIN, one, AUTO)]
    loads = [np.asarray(eplb_jax.metrics.balance(load, plan, topology).gpu_load) for plan in plans]
    plain, one, three = (x.max(axis=1) for x in loads)
    np.testing.assert_array_equal(plain, one)
    assert np.all(three <= one * (1 + 1e-6))
    assert three.sum() < one.sum()
