"""The list of moves from one plan to another."""

import jax
import numpy as np
import pytest

from eplb_jax import Topology, moves, plan
from eplb_jax.transition.moves import OTHER_NODE, SAME_GPU, SAME_NODE, STAYS, STORAGE
from tests.helpers import assert_same, lognormal

TOPOLOGY = Topology(8, slots=6, num_nodes=2)
OLD = np.tile(np.arange(12) % 8, (2, 1))


def two_plans():
    """Plans for two loads, of which the second starts anew on every node."""
    first, second = (
        plan(lognormal(6, 32, seed=x), TOPOLOGY, policy="global", strategy="greedy") for x in (0, 1)
    )
    return first, second


def test_an_expert_that_a_gpu_holds_twice():
    result = moves([[0, 0, 1, 2, 1, 3]], [[0, 1, 0, 2, 3, 3]], Topology(2, slots=3))
    assert result.source.tolist() == [[0, 2, 0, 3, 5, 5]]
    assert result.reach.tolist() == [[STAYS, SAME_GPU, SAME_GPU, STAYS, SAME_GPU, STAYS]]
    assert result.received.sum() == 0


def test_moves_lead_from_one_layout_to_the_other():
    first, second = two_plans()
    result = moves(first, second, TOPOLOGY)
    old, new, source, reach, sent, received, copies = map(
        np.asarray,
        (first.phy2log, second.phy2log, *result[:2], result.sent, result.received, result.copies),
    )
    np.testing.assert_array_equal(np.take_along_axis(old, source, axis=1), new)

    slot = np.arange(48)
    near = np.where(source // 24 == slot // 24, SAME_NODE, OTHER_NODE)
    near = np.where(source // 6 == slot // 6, SAME_GPU, near)
    np.testing.assert_array_equal(reach, np.where(source == slot, STAYS, near))
    for layer in range(6):
        for target in slot:  # no expert comes from farther away than it has to
            places = np.flatnonzero(old[layer] == new[layer, target])
            nearest = np.where(places // 24 == target // 24, SAME_NODE, OTHER_NODE)
            nearest[places // 6 == target // 6] = SAME_GPU
            nearest[places == target] = STAYS
            assert reach[layer, target] == nearest.min()
        between = reach[layer] >= SAME_NODE
        np.testing.assert_array_equal(
            sent[layer], np.bincount(source[layer, between] // 6, minlength=8)
        )
        np.testing.assert_array_equal(received[layer], np.bincount(slot[between] // 6, minlength=8))
        np.testing.assert_array_equal(copies[layer], np.bincount(reach[layer], minlength=5))
    assert copies[:, 1:4].min(axis=1).max() > 0  # all kinds occur
    traffic = result.traffic(10**9)
    np.testing.assert_array_equal(traffic.received, np.int64(10**9) * received)

    assert_same(jax.jit(lambda a, b: moves(a, b, TOPOLOGY))(first, second), result)
    one_layer = moves(first.layer(2), second.phy2log[2], TOPOLOGY)
    assert_same(one_layer, [x[2] for x in result])


def test_gpus_that_have_an_expert_take_turns():
    old = [0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9]
    new = [0, 1, 0, 2, 0, 3, 0, 5, 0, 7, 0, 9]
    assert moves(old, new, Topology(6, slots=2)).sent.tolist() == [1, 1, 1, 0, 0, 0]


def test_what_no_live_gpu_has_comes_from_storage():
    topology = Topology(4, slots=1, num_nodes=2)
    result = moves(np.arange(4), np.array([7, 1, 2, 7]), topology)
    assert result.source.tolist() == [-1, 1, 2, -1]
    assert result.reach.tolist() == [STORAGE, STAYS, STAYS, STORAGE]
    # GPU 0 has died: expert 0 is taken from GPU 3 in its stead, and its slot holds none.
    old, new = np.array([0, 1, 2, 0]), np.array([-1, 1, 0, 0])
    alive = moves(old, new, topology, active=[0, 1, 1, 1])
    assert alive.source.tolist() == [0, 1, 3, 3]
    assert alive.copies.tolist() == [3, 0, 1, 0, 0]
    assert moves(old, new, topology).source.tolist() == [0, 1, 3, 3]
    lost = moves(old, np.array([-1, 1, 2, 0]), topology, active=[0, 1, 1, 0])
    assert lost.source.tolist() == [0, 1, 2, -1]
    assert result.sent.tolist() == [0, 0, 0, 0]
    assert result.received.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: moves(OLD, OLD[:1], Topology(4, slots=3)),
            ValueError,
            r"new must have the shape \(2, 12\), got \(1, 12\)",
        ),
        (
            lambda: moves(OLD, OLD, Topology(4, slots=3), active=[True]),
            ValueError,
            r"active must have the shape \(4,\), got \(1,\)",
        ),
        (
            lambda: moves(OLD, OLD, Topology(8, slots=3)),
            ValueError,
            "topology has 8 GPUs of 3 slots, 24 in total, but the plan has 12 slots",
        ),
        (lambda: moves(OLD / 2, OLD, 4), TypeError, "old must hold integers, got dtype float64"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
