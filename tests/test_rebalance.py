import numpy as np
import oracle
import pytest
from helpers import assert_same, lognormal, repeats

import eplb_jax
from eplb_jax import STRATEGIES, check_placement, rebalance_experts

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


@pytest.mark.parametrize("strategy", [x for x in STRATEGIES if x not in ("auto", "greedy")])
def test_no_gpu_holds_an_expert_twice(strategy):
    weight = lognormal(6, 32, sigma=1.5)
    plan = rebalance_experts(weight, 48, 4, 2, 8, strategy=strategy)
    check_placement(plan)
    # An expert with more replicas than its node has GPUs must repeat; no other may.
    forced = np.maximum(np.asarray(plan.logcnt) - 4, 0).sum(axis=1)
    assert forced.max() > 0
    assert forced.min() == 0
    np.testing.assert_array_equal(repeats(plan.phy2log, 8), forced)


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
    auto = rebalance_experts(weight, 32, 4, 2, 8)
    assert_same(auto, rebalance_experts(weight, 32, 4, 2, 8, policy="hierarchical"))
    uneven = rebalance_experts(weight, 32, 3, 2, 8)
    assert_same(uneven, rebalance_experts(weight, 32, 3, 2, 8, policy="global"))
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
