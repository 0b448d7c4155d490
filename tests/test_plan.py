"""Whole plans: DeepSeek's by `greedy`, and what all other strategies guarantee."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_jax
from eplb_jax import Topology, check_placement, plan, rebalance_experts
from eplb_jax.evaluation.metrics import balance, gap
from tests import oracle
from tests.helpers import QUICK, assert_same, duplicates, lognormal

README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
# As the README of DeepSeek's EPLB prints it.
README_PLAN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
V3 = Topology(32, slots=9, num_nodes=4, num_groups=8)
NODES = Topology(8, slots=6, num_nodes=2, num_groups=4)  # 48 slots


def measured_load():
    return eplb_jax.loads.example().sum(axis=0)


def test_the_example_of_deepseeks_readme():
    result = rebalance_experts(README_LOAD, 16, 4, 2, 8, strategy="greedy")
    assert result.phy2log.tolist() == README_PLAN
    assert_same(result, oracle.rebalance_experts(README_LOAD, 16, 4, 2, 8))


@pytest.mark.parametrize(
    "shape",
    [(24, 32, 4, 2, 8), (24, 32, 3, 2, 8), (24, 24, 1, 1, 4), (30, 60, 6, 3, 6), (8, 8, 2, 2, 8)],
)
def test_greedy_is_deepseeks_plan(shape):
    num_experts, *counts = shape
    rng = np.random.default_rng(0)
    near = 1000 * (1 + 1e-6 * rng.standard_normal((5, num_experts)))
    for weight in (lognormal(5, num_experts), np.ceil(lognormal(5, num_experts)), near):
        result = rebalance_experts(weight, *counts, strategy="greedy")
        assert_same(result, oracle.rebalance_experts(weight, *counts))


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_greedy_is_deepseeks_plan_on_a_measured_load(policy):
    load = measured_load()[::8]
    groups, nodes = (8, 4) if policy == "hierarchical" else (1, 1)
    result = rebalance_experts(load, 288, 8, 4, 32, policy=policy, strategy="greedy")
    assert_same(result, oracle.rebalance_experts(load, 288, groups, nodes, 32))


def test_greedy_keeps_deepseeks_plan_without_load():
    zeros = np.zeros((1, 8))
    result = rebalance_experts(zeros, 12, 1, 1, 4, strategy="greedy")
    assert_same(result, oracle.rebalance_experts(zeros, 12, 1, 1, 4))


def test_the_native_form_is_deepseeks():
    load = lognormal(4, 32)
    expected = rebalance_experts(load, 48, 4, 2, 8, strategy="greedy")
    result = plan(load, NODES, strategy="greedy")
    assert_same(result, expected)
    phy2log, rank, logcnt = eplb_jax.plan_replicas(load, NODES, strategy="greedy")
    assert_same((phy2log, logcnt), (result.phy2log, result.logcnt))
    layer, slot = np.indices(phy2log.shape)
    np.testing.assert_array_equal(np.asarray(result.log2phy)[layer, phy2log, rank], slot)


def test_a_plan_of_one_layer_is_that_layer_of_many():
    load, old = lognormal(3, 32), plan(lognormal(3, 32, seed=1), NODES, strategy="greedy")
    many = plan(load, NODES, strategy="greedy", previous=old)
    for previous in (old.layer(2), np.asarray(old.phy2log)[2]):
        one = plan(load[2], NODES, strategy="greedy", previous=previous)
        chex.assert_trees_all_equal(one, many.layer(2))
    check_placement(one)
    counts = np.zeros(32, np.int32)
    counts[0] = 48
    lacking = one._replace(phy2log=np.zeros(48, np.int32), logcnt=counts)
    with pytest.raises(ValueError, match="layer 0 has no slot for expert 1"):
        check_placement(lacking)
    with pytest.raises(IndexError, match="layer 99 of a plan of 3 layers"):
        many.layer(np.int64(99))


def test_topologies_are_checked_and_hashable():
    assert Topology(np.int64(8), slots=6) == Topology.of_replicas(48, 8)
    assert hash(Topology(8, 6)) == hash(Topology(8, slots=6))
    for make, message in {
        lambda: Topology(8, slots=0): "slots=0 is less than 1; nearest: 1",
        lambda: Topology(8, slots=6, num_nodes=3): "num_nodes=3 does not divide num_gpus=8",
        lambda: Topology.of_replicas(50, 8): "num_replicas=50 is not a multiple of num_gpus=8",
        lambda: plan(np.ones((1, 64)), NODES): "48 slots for 64 experts; nearest: slots=8",
        lambda: plan(np.ones((1, 30)), NODES): "num_groups=4 does not divide number of experts=30",
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"topology must be an eplb_jax\.Topology, got 8"):
        plan(np.ones((1, 8)), 8)
    with pytest.raises(TypeError, match=r"slots must be an integer, got 2\.5"):
        Topology(8, slots=2.5)


@pytest.mark.parametrize("strategy", ["auto", "greedy_swap"])
def test_no_gpu_holds_an_expert_twice(strategy):
    weight = lognormal(6, 32, sigma=1.5)
    greedy = plan(weight, NODES, strategy="greedy")
    assert np.asarray(greedy.logcnt).max() > 4  # more than a node has GPUs
    result = plan(weight, NODES, strategy=strategy)
    check_placement(result)
    assert np.asarray(result.logcnt).max() == 4
    np.testing.assert_array_equal(duplicates(result.phy2log, 8), 0)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.data())
def test_no_gpu_holds_an_expert_twice_whatever_the_shape(data):
    num_gpus = data.draw(st.integers(2, 12))
    capacity = data.draw(st.integers(1, 8))
    num_experts = data.draw(st.integers(capacity, num_gpus * capacity))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    load = rng.lognormal(size=(60, num_experts)) ** rng.uniform(0.1, 3, (60, 1))
    load[::3] = np.ceil(load[::3])  # ties
    result = plan(load, Topology(num_gpus, slots=capacity), strategy="fast")
    check_placement(result)
    np.testing.assert_array_equal(duplicates(result.phy2log, num_gpus), 0)


def test_gpus_that_hold_more_slots_than_there_are_experts():
    result = plan(lognormal(4, 6), Topology(4, slots=8), strategy=QUICK)
    check_placement(result)
    forced = np.maximum(np.asarray(result.logcnt) - 4, 0).sum(axis=1)
    np.testing.assert_array_equal(duplicates(result.phy2log, 4), forced)


@pytest.mark.parametrize(
    ("slots", "gpus", "median", "worst"),
    [
        (9, 32, 1e-4, 3e-4),
        pytest.param(4, 72, 1e-3, 3e-3, marks=pytest.mark.quality),
        pytest.param(3, 96, 5e-3, 1e-2, marks=pytest.mark.quality),
    ],
)
def test_auto_is_near_the_proven_optimum(slots, gpus, median, worst):
    load, topology = measured_load(), Topology(gpus, slots=slots, num_nodes=4, num_groups=8)
    result = plan(load, topology, policy="global")
    gaps = np.asarray(gap(load, result, topology))
    assert np.median(gaps) < median
    assert np.quantile(gaps, 0.95) < worst
    np.testing.assert_array_equal(duplicates(result.phy2log, gpus), 0)


@pytest.mark.quality
def test_strategies_from_fast_to_best_balance_better():
    load, topology = eplb_jax.loads.example()[0, ::4, :64], Topology(8, slots=9)
    plans = [plan(load, topology, strategy=x) for x in ("fast", "auto", "best")]
    gaps = [np.asarray(gap(load, x, topology)).mean() for x in plans]
    assert gaps[2] < 0.5 * gaps[1]
    assert gaps[1] < gaps[0]


def test_plans_scale_and_follow_their_layers():
    load = lognormal(6, 32)
    result = plan(load, NODES)
    assert_same(plan(load * 2.0**30, NODES), result)
    counts = np.round(load * 1000)
    assert_same(plan(counts * 37, NODES), plan(counts, NODES))
    order = np.random.default_rng(0).permutation(6)
    assert_same(plan(load[order], NODES), [np.asarray(x)[order] for x in result])


def test_the_greedy_start_has_duplicates_that_others_must_remove():
    load = measured_load()
    greedy, swapped = (
        plan(load, V3, policy="global", strategy=x) for x in ("greedy", "greedy_swap")
    )
    assert duplicates(greedy.phy2log, 32).sum() > 0
    assert duplicates(swapped.phy2log, 32).sum() == 0
    imbalance = [balance(load, x, V3).mean_imbalance for x in (greedy, swapped)]
    assert imbalance[1] < imbalance[0]


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2)])
def test_without_load_spares_are_spread(groups, nodes):
    weight = np.stack([np.zeros(32), lognormal(1, 32)[0]])
    topology = Topology(8, slots=6, num_nodes=nodes, num_groups=groups)
    result = plan(weight, topology, strategy=QUICK)
    check_placement(result)
    logcnt = np.asarray(result.logcnt)[0]
    assert sorted(logcnt.tolist()) == [1] * 16 + [2] * 16
    by_gpu = np.asarray(result.phy2log)[0].reshape(8, 6)
    assert np.ptp((logcnt[by_gpu] == 2).sum(axis=1)) <= 4
    spares = np.asarray(result.log2phy)[0, :, 1:]
    np.testing.assert_array_equal(np.bincount(spares[spares >= 0] // 6, minlength=8), 2)
    np.testing.assert_array_equal(duplicates(result.phy2log, 8), 0)
    alone = plan(weight[[1, 1]], topology, strategy=QUICK)
    assert_same([x[1] for x in result], [x[1] for x in alone])


def test_groups_stay_on_one_node_under_the_hierarchical_policy():
    topology = Topology(8, slots=6, num_nodes=4, num_groups=8)
    result = plan(lognormal(5, 32), topology, policy="hierarchical", strategy=QUICK)
    for layer in np.asarray(result.phy2log):
        nodes = [{int(e) // 4 for e in node} for node in layer.reshape(4, -1)]
        assert all(len(groups) == 2 for groups in nodes)
        assert set.union(*nodes) == set(range(8))


def test_policies():
    weight = lognormal(3, 24)

    def greedy(groups, policy="auto"):
        return rebalance_experts(weight, 32, groups, 2, 8, policy=policy, strategy="greedy")

    auto, uneven = greedy(4), greedy(3)
    assert_same(auto, greedy(4, "hierarchical"))
    assert_same(uneven, greedy(3, "global"))
    assert not np.array_equal(auto.phy2log, uneven.phy2log)
    # The global policy needs no nodes.
    uneven_nodes = rebalance_experts(weight, 30, 1, 2, 15, strategy="greedy")
    assert_same(uneven_nodes, rebalance_experts(weight, 30, 1, 1, 15, strategy="greedy"))


def test_sizes_of_the_maps():
    result = plan(lognormal(3, 8), Topology(4, slots=3), strategy="greedy")
    assert result.log2phy.shape == (3, 8, 5)
    one_hot = plan(np.eye(8)[:1], Topology(12, slots=1), strategy=QUICK)
    assert one_hot.logcnt.tolist() == [[5] + [1] * 7]
    assert -1 not in one_hot.log2phy[0, 0].tolist()


def test_no_layers():
    result = rebalance_experts(np.zeros((0, 8)), 12, 2, 2, 4)
    assert [x.shape for x in result] == [(0, 12), (0, 8, 5), (0, 8)]
    check_placement(result)


def test_checks_of_loads_can_be_left_out(monkeypatch):
    bad, topology = jnp.asarray([[1.0, jnp.nan, -2.0, 4.0]]), Topology(2, slots=3)
    with pytest.raises(ValueError, match="load at layer 0, expert 1 is nan"):
        plan(bad, topology, strategy="greedy")
    meant = plan([[1, 0, 0, 4]], topology, strategy="greedy")
    monkeypatch.setattr(jax, "device_get", None)  # no value is read on the host
    assert_same(plan(bad, topology, strategy="greedy", check=False), meant)
    with pytest.raises(TypeError, match="NoneType"):
        plan(bad, topology, strategy="greedy")


@pytest.mark.parametrize("penalty", [0, np.float32(0), jnp.float32(0), 0.01])
def test_a_penalty_of_any_kind_of_number_limits_moves(penalty):
    old = plan(lognormal(3, 32), NODES, strategy="greedy")
    load, options = lognormal(3, 32, seed=1), {"strategy": "greedy", "previous": old}
    with pytest.raises(ValueError, match="move_penalty needs previous"):
        plan(load, NODES, strategy="greedy", move_penalty=penalty)
    result = plan(load, NODES, move_penalty=penalty, **options)
    limit = plan(load, NODES, move_penalty=float(penalty), max_moves=48, **options)
    assert_same(result, limit)
    free = plan(load, NODES, **options)
    moved, most = (np.sum(np.asarray(x.phy2log != old.phy2log)) for x in (result, free))
    assert moved == most if penalty == 0 else 0 < moved < most


def test_a_plan_in_place_must_be_one():
    load, topology = np.ones((1, 2)), Topology(2, slots=2)
    good = plan(load, topology)
    with pytest.raises(ValueError, match="previous is an invalid plan: log2phy"):
        plan(load, topology, previous=good._replace(log2phy=0 * good.log2phy))
    with pytest.raises(ValueError, match=r"previous has 3 slots, .*; nearest: 2, 4"):
        plan(load, topology, previous=[[0, 1, 1]])
    with pytest.raises(ValueError, match=r"previous must have 1 layers, got the shape \(2, 2\)"):
        plan(load, topology, previous=[[0, 1]] * 2)
    for options in ({}, {"max_moves": 0}):  # an expert without a slot gets one in any case
        found = plan(load, topology, previous=[[0, 0, 0, 0]], **options)
        assert 1 in found.phy2log[0].tolist()
