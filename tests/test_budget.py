"""From one plan to a better one within a few moves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, assert_same, lognormal

import eplb_jax
from eplb_jax import check_placement, moves
from eplb_jax.evaluation.metrics import balance
from eplb_jax.transition import local_search as budget

rebalance_experts = partial(eplb_jax.rebalance_experts, strategy=QUICK)
COUNTS = 48, 4, 2, 8  # slots, groups, nodes, GPUs
EXCHANGE = jax.jit(budget._exchange, static_argnums=1)
CHANGE = jax.jit(budget._change, static_argnums=1)


def drifted(layers=6, experts=32, sigma=0.5, seed=0):
    """A load, and what has become of it."""
    load = lognormal(layers, experts, seed=seed)
    change = np.random.default_rng(seed + 1).lognormal(sigma=sigma, size=load.shape)
    return load, (load * change).astype(np.float32)


def fetched(old, new, num_gpus=8, num_nodes=1):
    return np.asarray(moves(old, new, num_gpus, num_nodes).copies)[:, 2:].sum(axis=1)


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_each_move_more_evens_loads_and_none_keeps_the_plan(policy):
    load, later = drifted()
    old = rebalance_experts(load, *COUNTS, policy=policy)
    imbalance = []
    for most in (0, 1, 4, 12, 48):
        plan = rebalance_experts(later, *COUNTS, policy=policy, previous=old, max_moves=most)
        check_placement(plan)
        assert fetched(old, plan).max() <= most
        imbalance.append(float(balance(later, plan, 8).mean_imbalance))
        if policy == "hierarchical" and most < 48:
            assert not np.asarray(moves(old, plan, 8, 2).copies)[:, 3].any()
        if most == 0:
            assert_same(plan, old)
    assert np.all(np.diff(imbalance) < 0)
    free = rebalance_experts(later, *COUNTS, policy=policy)
    assert imbalance[-1] <= float(balance(later, free, 8).mean_imbalance) + 1e-6


def test_experts_that_stay_keep_their_slot():
    load, later = drifted()
    old = rebalance_experts(load, *COUNTS, policy="global")
    plan = rebalance_experts(later, *COUNTS, policy="global", previous=old.phy2log, max_moves=6)
    copies = np.asarray(moves(old, plan, 8).copies)
    assert not copies[:, 1].any()
    assert copies[:, 0].min() >= 42


def test_a_price_buys_what_it_is_worth():
    load, later = drifted()
    old = rebalance_experts(load, *COUNTS, policy="global")

    def cost(plan, price):
        return np.asarray(balance(later, plan, 8).imbalance) + price * fetched(old, plan)

    plans = {}
    for price in (1e-4, 0.005, 0.05, 10.0):
        options = {"policy": "global", "previous": old, "price": price}
        plans[price] = rebalance_experts(later, *COUNTS, **options)
    assert_same(plans[10.0], old)
    spent = [fetched(old, x).sum() for x in plans.values()]
    assert sorted(spent, reverse=True) == spent
    assert spent[1] > 0
    for price, plan in plans.items():
        assert np.all(cost(plan, price) <= cost(old, price) + 1e-6)
        for other in plans.values():  # on the way to them the better plan would have been seen
            assert cost(plan, price).mean() <= cost(other, price).mean() + 0.01


def test_several_windows_and_a_limit_on_both():
    load, later = drifted()
    trace = np.stack([load, later, later * 3])
    old = rebalance_experts(load, 48, 1, 1, 8)
    plan = rebalance_experts(trace, 48, 1, 1, 8, previous=old, max_moves=9, price=1e-3)
    assert 0 < fetched(old, plan).max() <= 9
    check_placement(plan)
    assert balance(later, plan, 8).mean_imbalance < balance(later, old, 8).mean_imbalance


def test_a_layer_without_load_keeps_its_plan():
    load, later = drifted(layers=2)
    old = rebalance_experts(load, *COUNTS)
    later[1] = 0
    plan = rebalance_experts(later, *COUNTS, previous=old, max_moves=5)
    assert fetched(old, plan).tolist()[1] == 0
    assert fetched(old, plan).tolist()[0] > 0


def view_of(seed, left=9):
    """A plan of 12 experts in 24 slots of 6 GPUs, and its loads in three windows."""
    rng = np.random.default_rng(seed)
    load = rng.lognormal(size=(3, 12)).astype(np.float32)
    first, second = rng.permutation(12), rng.permutation(12)
    expert = jnp.asarray(np.concatenate([first, second]).reshape(6, 4), jnp.int32)
    held = budget._held(expert[::-1] if seed % 2 else expert, 12) > 0
    seen = budget._seen(jnp.asarray(load), expert)
    return load, budget._View(*seen, held, jnp.int32(left))


def near(nodes):
    """Which GPUs share a node."""
    node = np.arange(6) // (6 // nodes)
    return node[:, None] == node


def squares(load, expert):
    expert = np.asarray(expert)
    share = load / np.bincount(expert.ravel(), minlength=load.shape[1])
    return np.square(share[:, expert].sum(axis=2)).sum()


def gains(load, view, change, nodes):
    """Gain and moves of every change of slot i by what `change` makes of it, by brute force."""
    expert, held = np.asarray(view.expert), np.asarray(view.held)
    gpu = np.arange(6)[:, None]
    for new in change(expert):
        if any(len(set(x)) < 4 for x in new.tolist()) or len(np.unique(new)) < 12:
            continue
        fetched = (~held[gpu, new]).sum() - (~held[gpu, expert]).sum()
        node = near(nodes)
        there = {e: {g for g in range(6) if e in expert[g]} for e in range(12)}
        reachable = all(
            any(node[g, h] for h in there[e]) for g in range(6) for e in new[g].tolist()
        )
        if reachable:
            yield squares(load, expert) - squares(load, new), fetched


def swaps(gpu, nodes):
    def change(expert):
        for i in range(4):
            for other in range(6):
                for j in range(4):
                    if other != gpu and near(nodes)[gpu, other]:
                        new = expert.copy()
                        new[gpu, i], new[other, j] = expert[other, j], expert[gpu, i]
                        yield new

    return change


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_exchange_of_the_worst_gpu(seed, nodes):
    load, view = view_of(seed)
    step = EXCHANGE(view, nodes, jnp.int32(0))
    loads = np.asarray(view.loads)
    above = np.maximum(loads - loads.mean(axis=1, keepdims=True), 0)
    worst = np.square(above).sum(axis=0).argmax()
    options = list(gains(load, view, swaps(worst, nodes), nodes))
    best = max(gain / max(moved, 0.5) for gain, moved in options)
    np.testing.assert_allclose(float(step.gain) / max(int(step.moves), 0.5), best, rtol=1e-3)
    np.testing.assert_allclose(
        step.gain, squares(load, view.expert) - squares(load, step.expert), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_change_gains_what_it_says(seed, nodes):
    load, view = view_of(seed)
    step = CHANGE(view, nodes)

    def every(expert):
        for slot in range(24):
            for other in range(12):
                new = expert.copy().ravel()
                new[slot] = other
                yield new.reshape(6, 4)

    options = [g for g in gains(load, view, every, nodes) if g[0] != 0]
    rate = float(step.gain) / max(int(step.moves), 0.5)
    assert rate <= max(gain / max(moved, 0.5) for gain, moved in options) + 1e-3
    if float(step.gain) > 0:
        actual = squares(load, view.expert) - squares(load, step.expert)
        np.testing.assert_allclose(step.gain, actual, rtol=1e-3, atol=1e-4)
    assert any(np.isclose(gain, step.gain, rtol=1e-3) for gain, _ in options)


def test_nothing_is_fetched_beyond_what_is_left():
    _, view = view_of(0, left=0)
    assert float(EXCHANGE(view, 1, jnp.int32(0)).gain) < 0
    assert float(CHANGE(view, 1).gain) < 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_moves": 3}, ValueError, "max_moves needs previous, the plan in place, got None"),
        ({"price": 0.1}, ValueError, "price needs previous"),
        ({"max_moves": -1}, ValueError, "max_moves=-1 is negative; nearest: 0"),
        ({"max_moves": 2.5}, TypeError, "max_moves must be a whole number, got 2.5"),
        ({"price": float("nan")}, ValueError, "price=nan must be finite and not negative"),
        ({"price": "much"}, TypeError, "price must be a number, got 'much'"),
    ],
)
def test_bad_limits_are_named(options, error, message):
    load, _ = drifted(layers=1)
    old = None if "needs" in message else rebalance_experts(load, *COUNTS)
    with pytest.raises(error, match=message):
        rebalance_experts(load, *COUNTS, previous=old, **options)


def test_an_old_plan_that_lacks_an_expert_is_an_error():
    with pytest.raises(ValueError, match="previous has no slot for expert 1 in layer 0"):
        eplb_jax.rebalance_experts([[1, 2]], 4, 1, 1, 2, previous=[[0, 0, 0, 0]], max_moves=1)
