"""From one plan to the next: what stays, and what the copies are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, lognormal
from scipy.optimize import linear_sum_assignment

from eplb_jax import check_placement, moves, rebalance_experts
from eplb_jax.evaluation.metrics import balance
from eplb_jax.transition.assignment import assignment
from eplb_jax.transition.moves import OTHER_NODE, SAME_GPU, SAME_NODE, STAYS

COUNTS = 48, 4, 2, 8  # slots, groups, nodes, GPUs


def next_plan(load, seed=1, **options):
    """A plan for this load, and for one that has drifted from it: without and with the first."""
    rng = np.random.default_rng(seed)
    later = load * rng.lognormal(sigma=0.3, size=load.shape).astype(np.float32)
    first = rebalance_experts(load, *COUNTS, **options)
    alone = rebalance_experts(later, *COUNTS, **options)
    return later, first, alone, rebalance_experts(later, *COUNTS, previous=first, **options)


def shared(old, new, num_gpus):
    """How many experts each old GPU has in common with each new one."""
    sets = [[set(gpu) for gpu in np.reshape(x, (num_gpus, -1)).tolist()] for x in (old, new)]
    return np.array([[len(a & b) for b in sets[1]] for a in sets[0]])


def most_kept(old, new, num_gpus, num_nodes):
    """By scipy's assignments: of the GPUs of every pair of nodes, then of the nodes."""
    per_node = num_gpus // num_nodes
    common = shared(old, new, num_gpus).reshape(num_nodes, per_node, num_nodes, per_node)
    kept = np.zeros((num_nodes, num_nodes), int)
    for a, b in itertools.product(range(num_nodes), repeat=2):
        values = common[a, :, b]
        kept[a, b] = values[linear_sum_assignment(values, maximize=True)].sum()
    return kept[linear_sum_assignment(kept, maximize=True)].sum()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 21])
def test_the_assignment_is_optimal(n):
    rng = np.random.default_rng(n)
    value = np.concatenate([rng.integers(0, most, (20, n, n)) for most in (2, 9, 1000)])
    column = np.asarray(jax.jit(jax.vmap(assignment))(jnp.asarray(value, jnp.int32)))
    np.testing.assert_array_equal(np.sort(column, axis=1), np.tile(np.arange(n), (60, 1)))
    best = [x[linear_sum_assignment(x, maximize=True)].sum() for x in value]
    np.testing.assert_array_equal(np.take_along_axis(value, column[..., None], 2).sum((1, 2)), best)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_as_many_experts_as_possible_stay_and_loads_are_the_same(policy):
    load = lognormal(6, 32)
    later, first, alone, plan = next_plan(load, policy=policy)
    check_placement(plan)
    nodes = 2 if policy == "hierarchical" else 1
    for old, free, new in zip(first.phy2log, alone.phy2log, plan.phy2log, strict=True):
        assert shared(old, new, 8).trace() == most_kept(old, free, 8, nodes)
    loads = [np.sort(balance(later, x, 8).gpu_load) for x in (plan, alone)]
    np.testing.assert_allclose(*loads, rtol=1e-6)  # added up in another order
    np.testing.assert_array_equal(plan.logcnt, alone.logcnt)
    before, after = (np.asarray(moves(first, x, 8).copies)[:, STAYS] for x in (alone, plan))
    assert np.all(after >= before)
    assert after.sum() > 1.5 * before.sum()


def test_experts_that_stay_on_their_gpu_keep_the_slot():
    _, first, _, plan = next_plan(lognormal(6, 32))
    for old, new in zip(
        np.reshape(first.phy2log, (-1, 6)), np.reshape(plan.phy2log, (-1, 6)), strict=True
    ):
        assert set(new[old != new].tolist()).isdisjoint(old.tolist())


def test_the_same_load_moves_nothing():
    load = lognormal(3, 32)
    first = rebalance_experts(load, *COUNTS)
    assert_same(rebalance_experts(load, *COUNTS, previous=first), first)
    assert_same(rebalance_experts(load, *COUNTS, previous=np.asarray(first.phy2log)), first)
    copies = moves(first, first, 8).copies
    np.testing.assert_array_equal(copies, [[48, 0, 0, 0]] * 3)
    mixed = np.random.default_rng(0).permutation(8)
    elsewhere = np.reshape(first.phy2log, (3, 8, 6))[:, mixed].reshape(3, 48)
    back = rebalance_experts(load, *COUNTS, previous=elsewhere, policy="global")
    forth = rebalance_experts(load, *COUNTS, policy="global")
    kept = [most_kept(a, b, 8, 1) for a, b in zip(elsewhere, forth.phy2log, strict=True)]
    np.testing.assert_array_equal(moves(elsewhere, back, 8).copies[:, STAYS], kept)


def test_an_expert_that_a_gpu_holds_twice():
    old = [[0, 0, 1, 2, 1, 3]]
    new = [[0, 1, 0, 2, 3, 3]]
    result = moves(old, new, 2)
    assert result.source.tolist() == [[0, 2, 0, 3, 5, 5]]
    assert result.reach.tolist() == [[STAYS, SAME_GPU, SAME_GPU, STAYS, SAME_GPU, STAYS]]
    assert result.received.sum() == 0


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_moves_lead_from_one_layout_to_the_other(policy):
    _, first, _, plan = next_plan(lognormal(6, 32), policy=policy)
    result = moves(first, plan, 8, 2)
    weights = np.asarray(first.phy2log)[..., None] * np.ones(3)  # each names its expert
    moved = np.take_along_axis(weights, np.asarray(result.source)[..., None], axis=1)
    np.testing.assert_array_equal(moved[..., 0], plan.phy2log)

    slot = np.arange(48)
    source, reach = np.asarray(result.source), np.asarray(result.reach)
    np.testing.assert_array_equal(reach == STAYS, source == slot)
    near = np.where(source // 24 == slot // 24, SAME_NODE, OTHER_NODE)
    far = np.where(source // 6 == slot // 6, SAME_GPU, near)
    np.testing.assert_array_equal(reach, np.where(source == slot, STAYS, far))
    for layer in range(6):
        held = [set(np.asarray(first.phy2log)[layer, lo : lo + 24].tolist()) for lo in (0, 24)]
        for target in np.flatnonzero(reach[layer] == OTHER_NODE):
            assert int(plan.phy2log[layer, target]) not in held[target // 24]
        between = reach[layer] >= SAME_NODE
        np.testing.assert_array_equal(
            result.sent[layer], np.bincount(source[layer, between] // 6, minlength=8)
        )
        np.testing.assert_array_equal(
            result.received[layer], np.bincount(slot[between] // 6, minlength=8)
        )
        np.testing.assert_array_equal(result.copies[layer], np.bincount(reach[layer], minlength=4))


def test_those_who_have_a_copy_share_the_sending():
    old = [[0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9]]
    new = [[0, 1, 0, 2, 0, 3, 0, 5, 0, 7, 0, 9]]
    assert moves(old, new, 6).sent.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_under_jit_and_for_greedy():
    load = jnp.asarray(lognormal(3, 32))
    later, first, alone, plan = next_plan(load, strategy="greedy")
    step = jax.jit(lambda w, old: rebalance_experts(w, *COUNTS, strategy="greedy", previous=old))
    assert_same(step(later, first), plan)
    assert_same(jax.jit(lambda a, b: moves(a, b, 8))(first, plan), moves(first, plan, 8))
    assert moves(first, plan, 8).received.sum() < moves(first, alone, 8).received.sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: rebalance_experts(np.ones((2, 8)), 12, 1, 1, 4, previous=p[:, :8]),
            ValueError,
            r"previous must have the shape \[layers, slots\] = \(2, 12\), got \(2, 8\)",
        ),
        (
            lambda p: rebalance_experts(np.ones((2, 8)), 12, 1, 1, 4, previous=p + 1),
            ValueError,
            "previous at layer 0, slot 7 is 8; experts are numbered 0 to 7",
        ),
        (
            lambda p: rebalance_experts(np.ones((2, 8)), 12, 1, 1, 4, previous=p / 2),
            TypeError,
            "previous must hold whole numbers, got dtype float64",
        ),
        (lambda p: moves(p, p[:1], 4), ValueError, r"new must have the shape .* \(2, 12\)"),
        (
            lambda p: moves(p, p + 1, 4),
            ValueError,
            "new holds expert 8 in layer 0, but old does not",
        ),
        (lambda p: moves(p, p, 5), ValueError, "num_gpus=5 does not divide number of slots=12"),
        (lambda p: moves(p, p, 4, 3), ValueError, "num_nodes=3 does not divide num_gpus=4"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.tile(np.arange(12) % 8, (2, 1)))
