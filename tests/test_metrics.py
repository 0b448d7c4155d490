"""Metrics of plans against counting by hand, over all leading axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Placement, Topology, check_placement
from eplb_jax.evaluation.metrics import balance, balance_of, gap, gpu_loads
from eplb_jax.planning.placement import place
from eplb_jax.types import Replication
from tests.helpers import lognormal

TOPOLOGY = Topology(5, slots=4)


@pytest.fixture(scope="module")
def plan():
    return eplb_jax.plan(lognormal(4, 12), TOPOLOGY, strategy="greedy")


def test_the_mean_is_over_gpus_not_over_layers():
    """The mean over layers would find 1.0 here."""
    balanced = balance_of(jnp.asarray([[100.0, 200.0], [100.0, 200.0]]))
    np.testing.assert_allclose(balanced.balancedness, [0.75, 0.75])
    np.testing.assert_allclose(balanced.imbalance, [1 / 3, 1 / 3], rtol=1e-6)
    assert float(balanced.mean_balancedness) == 0.75


def test_imbalance_is_overhead_and_balancedness_says_what_is_lost():
    measured = balance_of(jnp.asarray([[1.0, 3.0]]))
    # Two units of work each, three units of time: half again as long, a third of it lost.
    assert measured.imbalance.tolist() == [0.5]
    assert 1 - measured.balancedness[0] == pytest.approx(1 / 3)


def by_hand(load, plan):
    gpu_load = np.zeros((len(load), 5))
    for layer, slots in enumerate(np.asarray(plan.phy2log)):
        for slot, expert in enumerate(slots):
            gpu_load[layer, slot // 4] += load[layer, expert] / list(slots).count(expert)
    return gpu_load


def test_against_counting_by_hand(plan):
    load = lognormal(4, 12)
    gpu_load = by_hand(load, plan)
    measured = balance(load, plan, TOPOLOGY)
    np.testing.assert_allclose(measured.gpu_load, gpu_load, rtol=1e-5)
    imbalance = gpu_load.max(axis=1) / gpu_load.mean(axis=1) - 1
    np.testing.assert_allclose(measured.imbalance, imbalance, atol=1e-5)
    np.testing.assert_allclose(measured.mean_imbalance, imbalance.mean(), rtol=1e-4)


def test_windows_and_single_layers_are_measured_like_layers(plan):
    windows = np.stack([lognormal(4, 12, seed=seed) for seed in (1, 2, 3)])
    measured, gaps = balance(windows, plan, TOPOLOGY), gap(windows, plan, TOPOLOGY)
    assert measured.gpu_load.shape == (3, 4, 5)
    assert measured.balancedness.shape == gaps.shape == (3, 4)
    for t, load in enumerate(windows):
        of_window = balance(load, plan, TOPOLOGY)
        np.testing.assert_allclose(measured.gpu_load[t], of_window.gpu_load, rtol=1e-6)
        np.testing.assert_allclose(gaps[t], gap(load, plan, TOPOLOGY), rtol=1e-5)
    np.testing.assert_allclose(
        measured.mean_balancedness, np.mean(measured.balancedness), rtol=1e-6
    )
    one = balance(windows[0, 2], plan.layer(2), TOPOLOGY)
    np.testing.assert_allclose(one.gpu_load, measured.gpu_load[0, 2], rtol=1e-6)
    assert one.imbalance.shape == gap(windows[0, 2], plan.layer(2), TOPOLOGY).shape == ()


def test_a_foreign_map_is_a_plan(plan):
    load = lognormal(4, 12)
    for value in plan.phy2log.tolist(), np.asarray(plan.phy2log, np.int64), plan.phy2log:
        measured = gpu_loads(load, value, TOPOLOGY)
        np.testing.assert_array_equal(measured, gpu_loads(load, plan, TOPOLOGY))


def test_split_loads_by_hand(plan):
    windows = np.stack([lognormal(4, 12, seed=seed) for seed in (1, 2)])
    share = np.random.default_rng(0).random((2, 4, 20)).astype(np.float32)
    slots = np.take_along_axis(windows, np.asarray(plan.phy2log)[None].repeat(2, 0), 2) * share
    expected = slots.reshape(2, 4, 5, 4).sum(axis=3)
    measured = gpu_loads(windows, plan, TOPOLOGY, split=share)
    np.testing.assert_allclose(measured, expected, rtol=1e-5)
    shared = gpu_loads(windows, plan, TOPOLOGY, split=share[0])
    np.testing.assert_allclose(shared[0], expected[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"split has the shape \(4, 19\), but the plan is for"):
        gpu_loads(windows, plan, TOPOLOGY, split=share[0, :, 1:])


def test_under_jit_and_vmap(plan):
    windows = np.stack([lognormal(4, 12, seed=seed) for seed in (1, 2, 3)])
    expected = gpu_loads(windows, plan, TOPOLOGY)
    measure = jax.jit(lambda load, plan: balance(load, plan, TOPOLOGY).gpu_load)
    np.testing.assert_allclose(measure(windows, plan), expected, rtol=1e-6)
    mapped = jax.vmap(measure, (0, None))(windows, plan)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)


def test_a_layer_without_load_is_balanced():
    measured = balance(np.zeros((1, 4)), [[0, 1, 2, 3]], Topology(2, slots=2))
    assert measured.imbalance.tolist() == [0]
    assert measured.balancedness.tolist() == [1]


def test_rounding_makes_no_plan_better_than_perfect():
    loads = np.random.default_rng(0).random((1000, 1), np.float32).repeat(7, axis=1)
    measured = balance_of(jnp.asarray(loads))
    assert float(measured.imbalance.min()) >= 0
    assert float(measured.balancedness.max()) <= 1


def test_load_plan_and_topology_must_fit(plan):
    with pytest.raises(ValueError, match=r"\(1, 12\).*plan is for \(4, 12\)"):
        balance(np.ones((1, 12)), plan, TOPOLOGY)
    with pytest.raises(ValueError, match=r"\(12,\).*plan is for \(4, 12\)"):
        balance(np.ones(12), plan, TOPOLOGY)
    with pytest.raises(
        ValueError, match=r"topology has 10 GPUs of 4 slots, 40 in total, but .* 20"
    ):
        balance(np.ones((4, 12)), plan, Topology(10, slots=4))
    with pytest.raises(TypeError, match="Topology"):
        gap(np.ones((4, 12)), plan, (5, 4))
    with pytest.raises(ValueError, match="placement at layer 0, slot 1 is 9"):
        balance(np.ones((1, 4)), [[0, 9, 2, 3]], Topology(2, slots=2))
    with pytest.raises(ValueError, match="placement has no slot for expert 3"):
        balance(np.ones((1, 4)), [[0, 1, 2, 2]], Topology(2, slots=2))
    broken = plan._replace(logcnt=plan.logcnt + 1)
    with pytest.raises(ValueError, match="placement is an invalid plan: logcnt of layer 0"):
        balance(np.ones((4, 12)), broken, TOPOLOGY)


def test_a_valid_plan_passes_and_damage_is_found():
    phy2log, rank = jnp.asarray([[0, 1, 2, 0]]), jnp.asarray([[0, 0, 0, 1]])
    plan = place(Replication(phy2log, rank, jnp.asarray([[2, 1, 1]])))
    assert plan.log2phy.tolist() == [[[0, 3], [1, -1], [2, -1]]]
    check_placement(plan)
    damaged = {
        "outside 0..2": plan._replace(phy2log=jnp.asarray([[0, 1, 3, 0]])),
        "does not count": plan._replace(phy2log=jnp.asarray([[0, 1, 1, 0]])),
        "no slot for expert 2": Placement(
            jnp.asarray([[0, 1, 1, 0]]), plan.log2phy, jnp.asarray([[2, 2, 0]])
        ),
        "another number of slots": plan._replace(log2phy=jnp.asarray([[[0, -1], [1, 3], [2, -1]]])),
        "not the inverse": plan._replace(log2phy=jnp.asarray([[[0, 2], [1, -1], [3, -1]]])),
    }
    for message, broken in damaged.items():
        with pytest.raises(ValueError, match=message):
            check_placement(broken)


def test_the_public_names():
    assert set(eplb_jax.STRATEGIES) >= {"auto", "greedy", "lns", "pruned", "ensemble", "two_swap"}
