"""From one plan to a better one within a few moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, check_placement, moves
from eplb_jax.checks import as_limit, as_penalty
from eplb_jax.evaluation.metrics import balance
from eplb_jax.transition import local_search
from eplb_jax.transition.local_search import improve_plan
from tests.helpers import QUICK, assert_same, lognormal

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


def mean_imbalance(placement):
    return float(balance(LATER, placement, TOPOLOGY).mean_imbalance)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_loads_are_more_balanced_with_every_move(policy):
    old = plan(LOAD, policy)
    imbalance = []
    for most in (0, 1, 4, 12, 48):
        result = plan(policy=policy, previous=old, max_moves=most)
        check_placement(result)
        assert count_moves(old, result).max() <= most
        imbalance.append(mean_imbalance(result))
        if policy == "hierarchical" and most < 48:
            assert not np.asarray(moves(old, result, TOPOLOGY).copies)[:, 3].any()
        if most == 0:
            assert_same(result, old)
        if most == 12:  # slots whose expert stays on the GPU are left alone
            copies = np.asarray(moves(old, result, TOPOLOGY).copies)
            assert not copies[:, 1].any()
            assert copies[:, 0].min() >= 48 - most
    assert np.all(np.diff(imbalance) < 0)
    assert imbalance[-1] <= mean_imbalance(plan(policy=policy)) + 1e-6


@pytest.mark.parametrize("windows", [1, 2])
def test_a_limit_above_the_number_of_slots_is_none(windows):
    old = plan(LOAD)
    load = LATER if windows == 1 else np.stack([LATER] * windows)
    limited = plan(load, previous=old, max_moves=48)
    assert count_moves(old, limited).max() > 0
    for most in (10**6, 2**31 - 1):
        assert_same(plan(load, previous=old, max_moves=most), limited)


def test_moves_gain_what_they_cost():
    old = plan(LOAD)
    penalties = 1e-4, 0.005, 0.05, 10.0
    plans = [plan(previous=old, move_penalty=x) for x in penalties]
    assert_same(plans[-1], old)
    spent = [count_moves(old, x).sum() for x in plans]
    assert sorted(spent, reverse=True) == spent
    assert spent[1] > 0

    def cost(result, penalty):
        imbalance = np.asarray(balance(LATER, result, TOPOLOGY).imbalance)
        return imbalance + penalty * count_moves(old, result)

    for penalty, result in zip(penalties, plans, strict=True):
        assert np.all(cost(result, penalty) <= cost(old, penalty) + 1e-6)
        for other in plans:  # which the search has passed, or could have
            assert cost(result, penalty).mean() <= cost(other, penalty).mean() + 0.01


def test_several_windows_and_a_limit_on_both():
    old = plan(LOAD)
    trace = np.stack([LOAD, LATER])
    result = plan(trace, previous=old, max_moves=9, move_penalty=1e-3)
    assert 0 < count_moves(old, result).max() <= 9
    check_placement(result)
    assert mean_imbalance(result) < mean_imbalance(old)


def test_a_layer_without_load_keeps_its_plan():
    old = plan(LOAD)
    idle = LATER.copy()
    idle[1] = 0
    spent = count_moves(old, plan(idle, previous=old, max_moves=12))
    assert spent[1] == 0
    assert np.delete(spent, 1).min() > 0


def search(windows, old, max_moves, topology, *, hierarchical=False, penalty=0.0):
    """`improve_plan` of NumPy arrays: the experts of every GPU, and the cost."""
    expert, cost = improve_plan(
        jnp.asarray(windows, jnp.float32),
        jnp.asarray(old, jnp.int32),
        jnp.int32(max_moves),
        jnp.float32(penalty),
        topology=topology,
        hierarchical=hierarchical,
    )
    return np.sort(np.asarray(expert).reshape(len(old), topology.num_gpus, -1), axis=2), cost


def search_slowly(windows, old, max_moves, topology, *, hierarchical, penalty):
    """The same of one layer, where every expert has one slot: only swaps are possible."""

    def measure(expert):
        loads = windows[:, expert].sum(axis=2)
        moved = sum(len(set(x) - set(y)) for x, y in zip(expert.tolist(), start, strict=True))
        return loads, np.square(loads).sum(), moved

    expert = np.reshape(old, (topology.num_gpus, -1))
    start = expert.tolist()
    node = np.arange(topology.num_gpus) // topology.gpus_per_node
    best, failed = (np.inf, expert), 0
    for step in range(max_moves + 9):
        loads, squares, moved = measure(expert)
        cost = loads.max(axis=1).mean() / loads.mean() - 1 + penalty * moved
        best = min(best, (cost, expert), key=lambda x: x[0])
        if step == max_moves + 8:
            break
        above = np.maximum(loads - loads.mean(axis=1, keepdims=True), 0)
        gpu = np.argsort(-np.square(above).sum(axis=0), kind="stable")[failed % topology.num_gpus]
        options = [(0, expert)]
        for slot, other, theirs in np.ndindex(topology.slots, *expert.shape):
            if other == gpu or (hierarchical and node[other] != node[gpu]):
                continue
            new = expert.copy()
            new[gpu, slot], new[other, theirs] = expert[other, theirs], expert[gpu, slot]
            _, after, moves_after = measure(new)
            if moves_after <= max_moves:
                options.append(((squares - after) / max(moves_after - moved, 0.5), new))
        rate, expert = max(options, key=lambda x: x[0])
        failed = 0 if rate > 0 else failed + 1
    return best


@pytest.mark.parametrize("hierarchical", [False, True])
def test_swaps_are_those_of_a_slow_search(hierarchical):
    topology = Topology(4, slots=3, num_nodes=2)
    rng = np.random.default_rng(3)
    windows = rng.lognormal(size=(8, 3, 12)).astype(np.float32)
    old = np.stack([rng.permutation(12) for _ in windows])
    options = {"hierarchical": hierarchical, "penalty": 0.003}
    expert, cost = search(windows, old, 5, topology, **options)
    assert np.any(expert != np.sort(old.reshape(expert.shape), axis=2))
    for layer, (w, x) in enumerate(zip(windows, old, strict=True)):
        best_cost, best = search_slowly(w.astype(np.float64), x, 5, topology, **options)
        np.testing.assert_array_equal(expert[layer], np.sort(best, axis=1))
        np.testing.assert_allclose(cost[layer], best_cost, rtol=1e-4)


def test_equally_good_changes_stay_on_their_node():
    topology = Topology(4, slots=3, num_nodes=2)
    # GPU 3 may swap with any other; without nodes GPU 0 would be first.
    old = np.tile(np.arange(12), (8, 1))
    windows = np.tile([3, 1, 0, 3, 1, 0, 3, 1, 0, 5, 5, 0], (8, 3, 1))
    expert, _ = search(windows, old, 2, topology)
    assert np.all((expert != old.reshape(8, 4, 3)).any(axis=2) == [False, False, True, True])
    # GPU 0 or GPU 3 may get a replica of expert 0 in place of expert 10.
    old = np.array([[1, 2, 10, 3, 4, 5, 0, 6, 7, 8, 9, 10]])
    expert, _ = search([[[9, 1, 0, 1, 1, 0, 1, 0, 1, 0, 2]]], old, 1, topology)
    assert expert[0].tolist() == [[1, 2, 10], [3, 4, 5], [0, 6, 7], [0, 8, 9]]


def squares(load, expert):
    share = load / np.bincount(expert.ravel(), minlength=load.shape[1])
    return np.square(share[:, expert].sum(axis=2)).sum()


@pytest.mark.parametrize("hierarchical", [False, True])
def test_a_change_gains_what_it_says(hierarchical):
    """12 experts in 24 slots of 6 GPUs, in three windows."""
    topology = Topology(6, slots=4, num_nodes=2)
    node = np.arange(6) // 3
    rng = np.random.default_rng(0)
    load = rng.lognormal(size=(6, 3, 12)).astype(np.float32)
    expert = np.stack([np.append(rng.permutation(12), rng.permutation(12)) for _ in load])
    expert = expert.reshape(6, 6, 4).astype(np.int32)
    old = np.where(np.arange(6)[:, None, None] % 2, expert[:, ::-1], expert)
    held = (old[..., None] == np.arange(12)).any(axis=2)

    @jax.jit
    @jax.vmap
    def change(load, held, expert):
        units = local_search._units(load)
        view = local_search._view(units, held, jnp.int32(30), expert)
        scale = jnp.sum(units) / jnp.sum(load)
        step = local_search._change(view, topology, hierarchical)
        return step.expert, step.rate / scale**2

    for layer, (new, rate) in enumerate(zip(*change(load, held, expert), strict=True)):
        now, rates = expert[layer], []
        there = [{g for g in range(6) if e in now[g]} for e in range(12)]
        for gpu, slot, other in np.ndindex(6, 4, 12):
            near = any(node[gpu] == node[x] for x in there[other])
            if other in now[gpu] or len(there[now[gpu, slot]]) < 2 or (hierarchical and not near):
                continue
            option = now.copy()
            option[gpu, slot] = other
            moved = int(held[layer, gpu, now[gpu, slot]]) - int(held[layer, gpu, other])
            gain = squares(load[layer], now) - squares(load[layer], option)
            rates.append(gain / max(moved, 0.5))
            if np.array_equal(option, new):
                np.testing.assert_allclose(rate, rates[-1], rtol=1e-3, atol=1e-4)
                rates[-1] += 1e-3  # it was found
                found = layer
        assert found == layer
        assert rate <= max(rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_moves": 3}, "max_moves needs previous, the plan in place, got None"),
        ({"move_penalty": 0.1}, "move_penalty needs previous"),
        ({"max_moves": -1}, "max_moves=-1 is less than 0; nearest: 0"),
        ({"move_penalty": float("nan")}, "move_penalty=nan must be finite"),
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
