import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lognormal

import eplb_jax
from eplb_jax import Placement, check_placement, rebalance_experts
from eplb_jax.evaluation.metrics import balance, evenness
from eplb_jax.planning.placement import place
from eplb_jax.types import Replication


def test_the_mean_is_over_gpus_not_over_layers():
    """The mean over layers would find 1.0 here."""
    balanced = evenness(jnp.asarray([[100.0, 200.0], [100.0, 200.0]]))
    np.testing.assert_allclose(balanced.balancedness, [0.75, 0.75])
    np.testing.assert_allclose(balanced.imbalance, [1 / 3, 1 / 3], rtol=1e-6)
    assert float(balanced.mean_balancedness) == 0.75


def test_against_counting_by_hand():
    load = lognormal(4, 12)
    plan = rebalance_experts(load, 20, 1, 1, 5)
    gpu_load = np.zeros((4, 5))
    for layer in range(4):
        for slot, expert in enumerate(np.asarray(plan.phy2log)[layer]):
            gpu_load[layer, slot // 4] += load[layer, expert] / int(plan.logcnt[layer, expert])
    measured = balance(load, plan, 5)
    np.testing.assert_allclose(measured.gpu_load, gpu_load, rtol=1e-5)
    np.testing.assert_allclose(
        measured.imbalance, gpu_load.max(axis=1) / gpu_load.mean(axis=1) - 1, atol=1e-5
    )
    np.testing.assert_allclose(measured.mean_imbalance, measured.imbalance.mean(), rtol=1e-6)


def test_a_layer_without_load_is_balanced():
    plan = rebalance_experts(np.ones((1, 4)), 4, 1, 1, 2)
    measured = balance(np.zeros((1, 4)), plan, 2)
    assert measured.imbalance.tolist() == [0]
    assert measured.balancedness.tolist() == [1]


def test_load_and_plan_must_fit():
    plan = rebalance_experts(np.ones((1, 4)), 4, 1, 1, 2)
    with pytest.raises(ValueError, match=r"\(1, 5\).*plan is for \(1, 4\)"):
        balance(np.ones((1, 5)), plan, 2)
    with pytest.raises(
        ValueError, match="num_gpus=3 does not divide number of slots=4; nearest: 2, 4"
    ):
        balance(np.ones((1, 4)), plan, 3)


def test_a_sound_plan_passes_and_damage_is_found():
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
