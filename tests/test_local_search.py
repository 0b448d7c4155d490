"""From one plan to a better one within few moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, check_placement, moves
from eplb_jax.checks import as_limit, as_penalty
from eplb_jax.evaluation.metrics import balance
from eplb_jax.transition.local_search import Goal, improve_plan, plan_cost
from eplb_jax.transition.slot_swaps import pairing
from tests.helpers import QUICK, assert_same, duplicates, lognormal

TOPOLOGY = Topology(8, slots=6, num_nodes=2, num_groups=4)
LAYERS, EXPERTS = 6, 32
LOAD = lognormal(LAYERS, EXPERTS)
DRIFT = np.random.default_rng(1).lognormal(sigma=0.5, size=LOAD.shape)
LATER = (LOAD * DRIFT).astype(np.float32)


def plan(load=LATER, policy="global", **options):
    return eplb_jax.plan(load, TOPOLOGY, policy=policy, strategy=QUICK, **options)


def count_moves(old, new):
    """Slots of every layer with an expert from another GPU."""
    return np.asarray(moves(old, new, TOPOLOGY).received).sum(axis=-1)


def imbalance(placement, load=LATER):
    return np.asarray(balance(load, placement, TOPOLOGY).imbalance)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_a_higher_limit_is_never_worse(policy):
    old = plan(LOAD, policy)
    before = np.full(LAYERS, np.inf)
    for most in (0, 1, 2, 4, 7, 12, 48):
        result = plan(policy=policy, previous=old, max_moves=most, tolerance=0)
        check_placement(result)
        assert count_moves(old, result).max() <= most
        assert np.all(imbalance(result) <= before + 1e-6)
        before = imbalance(result)
        copies = np.asarray(moves(old, result, TOPOLOGY).copies)
        if policy == "hierarchical" and most < 48:
            assert not copies[:, 3].any()
        if most == 0:
            assert_same(result, old)
        if most == 7:  # slots whose expert stays on the GPU are left alone
            assert not copies[:, 1].any()
    assert np.all(before <= imbalance(plan(policy=policy)) + 1e-6)
    assert before.mean() < imbalance(old).mean() / 3


def test_windows_added_up_are_never_worse_either():
    old, windows = plan(LOAD), np.stack([LOAD, LATER, LATER * DRIFT])
    total = np.inf
    for most in (0, 3, 6, 12, 24):
        result = plan(windows, previous=old, max_moves=most, tolerance=0)
        loads = np.asarray(balance(windows, result, TOPOLOGY).gpu_load, np.float64)
        share = loads / loads.sum(axis=2, keepdims=True)
        assert share.max(axis=2).sum() <= total * (1 + 1e-3)  # equal weights, but for evidence
        total = share.max(axis=2).sum()


def test_a_plan_is_kept_unless_a_new_one_is_better_by_more_than_the_tolerance():
    old = plan(LOAD)
    assert_same(plan(LOAD, previous=old), old)
    assert_same(plan(LOAD * 7, previous=old, tolerance=0), old)
    noisy = LOAD * np.random.default_rng(0).lognormal(0, 0.003, LOAD.shape)
    new = imbalance(plan(noisy), noisy)
    for tolerance in (0.05, 0.3, 1.0):
        result = plan(noisy, previous=old, tolerance=tolerance)
        allowed = new + tolerance * (0.01 + new)
        assert np.all(imbalance(result, noisy) <= 2 * allowed - new + 1e-5)
        kept = imbalance(old, noisy) <= allowed - 1e-5
        assert np.all(count_moves(old, result)[kept] == 0)
    assert kept.all()
    few, many = (count_moves(old, plan(noisy, previous=old, tolerance=x)) for x in (0.1, None))
    assert few.sum() < many.sum() / 2


def test_loads_that_are_equal_or_zero_change_nothing():
    old, load = plan(LOAD), LATER.copy()
    load[1] = 0
    result = plan(load, previous=old)
    assert count_moves(old, result)[1] == 0
    assert_same(result.layer(1), old.layer(1))
    assert np.delete(count_moves(old, result), 1).min() > 0
    ones = np.ones_like(LOAD)
    even = plan(ones)
    assert_same(plan(ones, previous=even), even)


def test_moves_gain_what_they_cost():
    old = plan(LOAD)
    penalties = 1e-4, 0.005, 0.05, 10.0
    plans = [plan(previous=old, move_penalty=x) for x in penalties]
    assert_same(plans[-1], old)
    spent = [count_moves(old, x).sum() for x in plans]
    assert sorted(spent, reverse=True) == spent
    assert spent[1] > 0
    for penalty, result in zip(penalties, plans, strict=True):
        cost = imbalance(result) + penalty * count_moves(old, result)
        assert np.all(cost <= imbalance(old) + 1e-6)


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("speed", [None, np.linspace(0.7, 1.3, 7, dtype=np.float32)])
def test_cost_and_moves_are_those_of_the_plan_found(hierarchical, speed):
    """7 GPUs on nodes of 3 and 4, of 4 to 6 slots."""
    topology = Topology(7, slots=[4, 5, 6, 5, 4, 6, 5], nodes=[0, 0, 0, 1, 1, 1, 1])
    rng = np.random.default_rng(0)
    windows = rng.lognormal(size=(5, 3, 20)).astype(np.float32)
    old = np.stack([rng.permutation(np.resize(np.arange(20), 35)) for _ in windows])
    options = {"topology": topology, "speed": None if speed is None else jnp.asarray(speed)}

    @jax.jit
    def search(windows, old):
        goal = Goal(jnp.zeros(len(old)), jnp.full(len(old), 9, jnp.int32), jnp.float32(0))
        return improve_plan(windows, old, old, goal, hierarchical=hierarchical, **options)

    start = jnp.asarray(old, jnp.int32)
    expert, cost, spent = (np.asarray(x) for x in search(jnp.asarray(windows), start))
    gpu, node = topology.gpu_of_slot, topology.node_of_gpu
    for layer in range(5):
        count = np.bincount(expert[layer], minlength=20)
        assert count.min() >= 1
        of_slot = (windows[layer] / count)[:, expert[layer]]
        load = np.stack([of_slot[:, gpu == g].sum(axis=1) for g in range(7)], axis=1)
        each = np.ones(7) if speed is None else speed
        level = load.sum() / each.sum()
        np.testing.assert_allclose(cost[layer], (load / each).max(axis=1).sum() / level - 1, 1e-4)
        before = [set(old[layer, gpu == g]) for g in range(7)]
        after = [expert[layer, gpu == g].tolist() for g in range(7)]
        moved = sum(e not in x for x, y in zip(before, after, strict=True) for e in y)
        assert moved == spent[layer] <= 9
        if hierarchical:
            for n in (0, 1):
                here = [set(expert[layer, node[gpu] == n]) - set(old[layer, node[gpu] == n])]
                assert here == [set()]
    begin, none = jax.jit(partial(plan_cost, **options))(jnp.asarray(windows), start, start)
    assert np.all(cost < np.asarray(begin))
    assert not np.asarray(none).any()
    # The plan of a layer does not depend on the layers beside it.
    others = jnp.asarray(windows[::-1] ** 2).at[2].set(windows[2])
    beside = search(others, start[::-1].at[2].set(start[2]))
    np.testing.assert_array_equal(beside[0][2], expert[2])
    assert np.any(np.asarray(beside[0][0]) != expert[4])


def test_duplicates_of_the_plan_in_place_are_removed():
    on_gpu = np.arange(EXPERTS).reshape(8, 4)[:, [0, 0, 1, 1, 2, 3]]  # two of them twice
    old = np.tile(on_gpu.reshape(1, -1), (LAYERS, 1))
    result = plan(previous=old)
    assert duplicates(old, 8).min() == 16
    assert duplicates(result.phy2log, 8).max() == 0


@pytest.mark.parametrize("sizes", [[8], [3, 4], [1, 5], [1, 1]])
def test_pairs_are_within_nodes(sizes):
    node = np.repeat(np.arange(len(sizes)), sizes)
    table, half = pairing(node, 12)
    assert half == sum(size // 2 for size in sizes)
    np.testing.assert_array_equal(np.sort(table, axis=1), np.tile(np.arange(node.size), (12, 1)))
    np.testing.assert_array_equal(node[table[:, :half]], node[table[:, half : 2 * half]])
    together = {frozenset(x) for row in table for x in zip(row[:half], row[half:], strict=False)}
    assert len(together) >= sum(size * (size - 1) // 2 for size in sizes) * 3 // 4


def test_other_limits_compile_nothing():
    old = plan(LOAD)
    plan(previous=old, max_moves=3)
    before = eplb_jax.planning.next_plan.next_plan.__wrapped__._cache_size()
    plan(previous=old, max_moves=5, move_penalty=1e-3, tolerance=0.2)
    assert eplb_jax.planning.next_plan.next_plan.__wrapped__._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_moves": 3}, "max_moves needs previous, the plan in place, got None"),
        ({"move_penalty": 0.1}, "move_penalty needs previous"),
        ({"max_moves": -1}, "max_moves=-1 is less than 0; nearest: 0"),
        ({"move_penalty": float("nan")}, "move_penalty=nan must be finite"),
        ({"tolerance": -0.5}, "tolerance=-0.5 must be finite and not negative"),
        ({"tolerance": None, "max_moves": 1}, "tolerance=None, a new plan, takes no limits"),
    ],
)
def test_bad_limits_are_named(options, message):
    old = None if "needs" in message else np.arange(48) % EXPERTS * np.ones((LAYERS, 1), int)
    with pytest.raises(ValueError, match=message):
        plan(previous=old, **options)


def test_limits_of_the_wrong_kind_are_named():
    with pytest.raises(TypeError, match=r"max_moves must be an? .*, got 2\.5"):
        as_limit("max_moves", 2.5)
    with pytest.raises(TypeError, match="move_penalty must be a number, got 'much'"):
        as_penalty("move_penalty", "much")
