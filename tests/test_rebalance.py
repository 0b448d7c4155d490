import numpy as np
import oracle
import pytest
from helpers import assert_same, lognormal, repeats
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_jax
from eplb_jax import check_placement, rebalance_experts

README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
# As the README of DeepSeek's EPLB prints it.
README_PLAN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_example_of_deepseeks_readme():
    plan = rebalance_experts(README_LOAD, 16, 4, 2, 8, strategy="greedy")
    assert plan.phy2log.tolist() == README_PLAN
    assert_same(plan, oracle.rebalance_experts(README_LOAD, 16, 4, 2, 8))


@pytest.mark.parametrize(
    "shape",
    [(24, 32, 4, 2, 8), (24, 32, 3, 2, 8), (24, 24, 1, 1, 4), (30, 60, 6, 3, 6), (8, 8, 2, 2, 8)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_is_deepseeks_plan(shape, ties):
    num_experts, *counts = shape
    weight = lognormal(5, num_experts)
    weight = np.ceil(weight) if ties else weight
    plan = rebalance_experts(weight, *counts, strategy="greedy")
    assert_same(plan, oracle.rebalance_experts(weight, *counts))


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_greedy_is_deepseeks_plan_on_a_measured_load(policy):
    load = eplb_jax.loads.example().sum(axis=0)[::8]
    groups, nodes = (8, 4) if policy == "hierarchical" else (1, 1)
    plan = rebalance_experts(load, 288, 8, 4, 32, policy=policy, strategy="greedy")
    assert_same(plan, oracle.rebalance_experts(load, 288, groups, nodes, 32))


def test_greedy_keeps_deepseeks_plan_without_load():
    zeros = np.zeros((1, 8))
    plan = rebalance_experts(zeros, 12, 1, 1, 4, strategy="greedy")
    assert_same(plan, oracle.rebalance_experts(zeros, 12, 1, 1, 4))


@pytest.mark.parametrize("strategy", ["auto", "best", "greedy_swap", "lns"])
def test_no_gpu_holds_an_expert_twice(strategy):
    weight = lognormal(6, 32, sigma=1.5)
    greedy = rebalance_experts(weight, 48, 4, 2, 8, strategy="greedy")
    assert np.asarray(greedy.logcnt).max() > 4  # more than a node has GPUs
    plan = rebalance_experts(weight, 48, 4, 2, 8, strategy=strategy)
    check_placement(plan)
    assert np.asarray(plan.logcnt).max() == 4
    np.testing.assert_array_equal(repeats(plan.phy2log, 8), 0)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_no_gpu_holds_an_expert_twice_whatever_the_shape(data):
    num_gpus = data.draw(st.integers(2, 12))
    capacity = data.draw(st.integers(1, 8))
    num_experts = data.draw(st.integers(capacity, num_gpus * capacity))
    strategy = data.draw(st.sampled_from(["auto", "fast"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    load = rng.lognormal(size=(60, num_experts)) ** rng.uniform(0.1, 3, (60, 1))
    load[::3] = np.ceil(load[::3])  # ties
    plan = rebalance_experts(load, num_gpus * capacity, 1, 1, num_gpus, strategy=strategy)
    check_placement(plan)
    np.testing.assert_array_equal(repeats(plan.phy2log, num_gpus), 0)


def test_gpus_that_hold_more_slots_than_there_are_experts():
    plan = rebalance_experts(lognormal(4, 6), 32, 1, 1, 4)
    check_placement(plan)
    forced = np.maximum(np.asarray(plan.logcnt) - 4, 0).sum(axis=1)
    np.testing.assert_array_equal(repeats(plan.phy2log, 4), forced)


@pytest.mark.parametrize(
    ("replicas", "gpus", "median", "worst"),
    [(288, 32, 1e-4, 3e-4), (288, 72, 1e-3, 3e-3), (288, 96, 5e-3, 1e-2)],
)
def test_auto_is_near_the_proven_optimum(replicas, gpus, median, worst):
    load = eplb_jax.loads.example().sum(axis=0)
    plan = rebalance_experts(load, replicas, 1, 1, gpus)
    gaps = np.asarray(eplb_jax.metrics.gap(load, plan, gpus))
    assert np.median(gaps) < median
    assert np.quantile(gaps, 0.95) < worst
    np.testing.assert_array_equal(repeats(plan.phy2log, gpus), 0)


def test_strategies_from_fast_to_best_balance_better():
    load = eplb_jax.loads.example()[0, ::4, :64]
    plans = [rebalance_experts(load, 72, 1, 1, 8, strategy=x) for x in ("fast", "auto", "best")]
    gaps = [np.asarray(eplb_jax.metrics.gap(load, plan, 8)).mean() for plan in plans]
    assert gaps[2] < 0.5 * gaps[1]
    assert gaps[1] < gaps[0]


def test_plans_scale_and_follow_their_layers():
    load = lognormal(6, 32)
    plan = rebalance_experts(load, 48, 4, 2, 8)
    assert_same(rebalance_experts(load * 2.0**30, 48, 4, 2, 8), plan)
    counts = np.round(load * 1000)
    assert_same(rebalance_experts(counts * 37, 48, 4, 2, 8), rebalance_experts(counts, 48, 4, 2, 8))
    order = np.random.default_rng(0).permutation(6)
    assert_same(rebalance_experts(load[order], 48, 4, 2, 8), [np.asarray(x)[order] for x in plan])


def test_the_greedy_start_has_repeats_that_others_must_remove():
    load = eplb_jax.loads.example().sum(axis=0)
    greedy = rebalance_experts(load, 288, 8, 4, 32, policy="global", strategy="greedy")
    assert repeats(greedy.phy2log, 32).sum() > 0
    swapped = rebalance_experts(load, 288, 8, 4, 32, policy="global", strategy="greedy_swap")
    assert repeats(swapped.phy2log, 32).sum() == 0
    imbalance = [eplb_jax.metrics.balance(load, x, 32).mean_imbalance for x in (greedy, swapped)]
    assert imbalance[1] < imbalance[0]


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2)])
def test_without_load_spares_are_spread(groups, nodes):
    weight = np.stack([np.zeros(32), lognormal(1, 32)[0]])
    plan = rebalance_experts(weight, 48, groups, nodes, 8)
    check_placement(plan)
    logcnt = np.asarray(plan.logcnt)[0]
    assert sorted(logcnt.tolist()) == [1] * 16 + [2] * 16
    by_gpu = np.asarray(plan.phy2log)[0].reshape(8, 6)
    doubled = (logcnt[by_gpu] == 2).sum(axis=1)
    assert np.ptp(doubled) <= 4
    spares = np.asarray(plan.log2phy)[0, :, 1:]
    np.testing.assert_array_equal(np.bincount(spares[spares >= 0] // 6, minlength=8), 2)
    np.testing.assert_array_equal(repeats(plan.phy2log, 8), 0)
    alone = rebalance_experts(weight[1:], 48, groups, nodes, 8)
    assert_same([x[1:] for x in plan], alone)


def test_groups_stay_on_one_node_under_the_hierarchical_policy():
    plan = rebalance_experts(lognormal(5, 32), 48, 8, 4, 8, policy="hierarchical")
    for layer in np.asarray(plan.phy2log):
        nodes = [{int(e) // 4 for e in node} for node in layer.reshape(4, -1)]
        assert all(len(groups) == 2 for groups in nodes)
        assert set.union(*nodes) == set(range(8))


def test_policies():
    weight = lognormal(3, 24)

    def plan(groups, policy="auto"):
        return rebalance_experts(weight, 32, groups, 2, 8, policy=policy, strategy="greedy")

    auto, uneven = plan(4), plan(3)
    assert_same(auto, plan(4, "hierarchical"))
    assert_same(uneven, plan(3, "global"))
    assert not np.array_equal(auto.phy2log, uneven.phy2log)


def test_sizes_of_the_maps():
    plan = rebalance_experts(lognormal(3, 8), 12, 1, 1, 4)
    assert plan.log2phy.shape == (3, 8, 5)
    one_hot = rebalance_experts(np.eye(8)[:1], 12, 1, 1, 12)
    assert one_hot.logcnt.tolist() == [[5] + [1] * 7]
    assert -1 not in one_hot.log2phy[0, 0].tolist()


def test_layers_of_none():
    plan = rebalance_experts(np.zeros((0, 8)), 12, 2, 2, 4)
    assert [x.shape for x in plan] == [(0, 12), (0, 8, 5), (0, 8)]
    check_placement(plan)
