"""GPUs that come, go and differ."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, check_placement, metrics, moves, plan
from eplb_jax.planning import next_plan
from eplb_jax.transition.completion import complete_plan
from tests.helpers import QUICK, assert_same, duplicates, lognormal

TOPOLOGY = Topology(8, slots=6, num_nodes=2, num_groups=4)
LOAD = lognormal(3, 32)
OPTIONS = {"policy": "global", "strategy": QUICK}


def by_gpu(placement, num_gpus=8):
    return np.asarray(getattr(placement, "phy2log", placement)).reshape(3, num_gpus, -1)


def kept(old, new):
    """The share of slots whose expert was on the same GPU before, of those with an expert."""
    pairs = zip(by_gpu(old).reshape(-1, 6), by_gpu(new).reshape(-1, 6), strict=True)
    held = [[e in x for e in y] for x, y in pairs if y.min() >= 0]
    return np.mean(held)


def check(new, live):
    """Every expert is on a live GPU, at most once on each, and dead ones hold none."""
    check_placement(new)
    assert np.all((by_gpu(new) >= 0).all(axis=2) == live[None])
    assert np.all((by_gpu(new) < 0).all(axis=2) != live[None])
    assert duplicates(by_gpu(new)[:, live].reshape(3, -1), live.sum()).max() == 0


def test_random_events_lose_no_expert_and_compile_nothing():
    """One leaves, two leave, they come back, in random order and with other loads and speeds."""
    rng = np.random.default_rng(0)
    step = jax.jit(
        lambda load, old, active, speed: plan(
            load, TOPOLOGY, previous=old, active=active, speed=speed, **OPTIONS
        )
    )
    old, live, sizes, stays = plan(LOAD, TOPOLOGY, **OPTIONS), np.ones(8, bool), set(), []
    for _ in range(200):
        gpu = rng.permutation(8)[: rng.integers(1, 3)]
        live = live.copy()
        live[gpu] = ~live[gpu]
        if live.sum() < 6:  # 36 slots for 32 experts
            live[:6] = True
        load = (LOAD * rng.lognormal(0, 0.05, LOAD.shape)).astype(np.float32)
        speed = rng.uniform(0.8, 1.2, 8).astype(np.float32) if rng.random() < 0.5 else np.ones(8)
        new = step(load, old.phy2log, live, speed.astype(np.float32))
        check(new, live)
        transfer = moves(old, new, TOPOLOGY, active=live)
        source = np.asarray(transfer.source)
        before = np.where(live[TOPOLOGY.gpu_of_slot], np.asarray(old.phy2log), -1)
        taken = np.take_along_axis(before, np.maximum(source, 0), axis=1)
        lost = [sorted(set(range(32)) - set(x)) for x in before]
        for layer, (s, t, now) in enumerate(zip(source, taken, new.phy2log, strict=True)):
            np.testing.assert_array_equal(t[s >= 0], np.where(np.asarray(now) < 0, t, now)[s >= 0])
            assert set(np.asarray(now)[s < 0].tolist()) == set(lost[layer])
        stays.append(kept(before, new))
        sizes.add(step._cache_size())
        old = new
    assert sizes == {1}
    assert np.mean(stays) > 0.5


def test_the_plan_in_place_stays_where_a_gpu_leaves_and_comes_back():
    topology, load = Topology(8, slots=40), lognormal(2, 256)
    old = plan(load, topology, strategy=QUICK)
    live = np.arange(8) != 3
    without = plan(load, topology, previous=old, active=live, strategy=QUICK)
    transfer = moves(old, without, topology, active=live)
    arrived = np.asarray(transfer.received).sum(axis=1)
    lost = [
        256 - len(set(x)) for x in np.delete(old.phy2log.reshape(2, 8, 40), 3, 1).reshape(2, -1)
    ]
    assert np.all(arrived >= lost)
    assert np.all(arrived <= 0.2 * 280)
    assert np.all(np.asarray(transfer.copies)[:, 4] >= lost)
    assert float(metrics.balance(load, without, topology).mean_imbalance) < 0.005
    back = plan(load, topology, previous=without, active=np.ones(8, bool), strategy=QUICK)
    assert (
        np.asarray(moves(without, back, topology).received)[:, np.arange(8) != 3].sum() < 0.15 * 560
    )
    assert float(metrics.balance(load, back, topology).mean_imbalance) < 0.005


def test_another_number_of_gpus():
    old = plan(LOAD, TOPOLOGY, **OPTIONS)
    grown = plan(LOAD, Topology(10, slots=6), previous=old, **OPTIONS)
    check_placement(grown)
    assert np.mean(by_gpu(grown, 10)[:, :8] == by_gpu(old)) > 0.5
    shrunk = plan(LOAD, Topology(6, slots=6), previous=old, **OPTIONS)
    assert np.mean(by_gpu(shrunk, 6) == by_gpu(old)[:, :6]) > 0.5
    survivors = 0, 1, 2, 4, 5, 7
    named = plan(LOAD, Topology(6, slots=6), previous=old, previous_gpus=survivors, **OPTIONS)
    left = by_gpu(old)[:, list(survivors)].reshape(3, 36)
    assert_same(named, plan(LOAD, Topology(6, slots=6), previous=left, **OPTIONS))
    names = {"previous_gpus": (1, 0, *range(2, 8)), "active": np.ones(8, bool)}
    swapped = plan(LOAD, TOPOLOGY, previous=old, **names, **OPTIONS)
    assert np.mean(by_gpu(swapped)[:, :2] == by_gpu(old)[:, [1, 0]]) > 0.8


def test_groups_stay_on_their_nodes_with_a_dead_gpu():
    topology = Topology(8, slots=6, num_nodes=2, num_groups=4)
    load = lognormal(3, 16)
    old = plan(load, topology, strategy=QUICK)
    live = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
    new = plan(load, topology, previous=old, active=live, strategy=QUICK)
    check(new, live)
    for before, after in zip(by_gpu(old), by_gpu(new), strict=True):
        for node in (slice(4), slice(4, 8)):
            assert set(after[node].ravel()) - {-1} == set(before[node].ravel())
    # A whole node: the other one holds all.
    alone = plan(load, topology, previous=old, active=np.arange(8) < 4, strategy=QUICK)
    check(alone, np.arange(8) < 4)


@pytest.mark.parametrize("seed", range(3))
def test_speeds_and_slots_of_their_own(seed):
    rng = np.random.default_rng(seed)
    load = lognormal(6, 64, sigma=0.7, seed=seed)
    speed = rng.uniform(0.7, 1.3, 12).astype(np.float32)
    slots = [9, 7, 8, 0, 10, 8, 8, 8, 7, 9, 10, 12]
    for topology, pace in ((Topology(12, slots=8), speed), (Topology(12, slots=slots), None)):
        result = plan(load, topology, speed=pace)
        check_placement(result)
        assert np.all(np.asarray(result.phy2log) >= 0)
        gap = np.asarray(metrics.gap(load, result, topology, speed=pace))
        assert np.all(gap >= -1e-5)
        assert np.median(gap) < 3e-4


def test_completion_changes_only_what_is_missing():
    old = np.array([[0, 1, -1, 3, 4, -1, 0, 1]], np.int32)
    live = jnp.ones(4, bool)
    topology = Topology(4, slots=2)
    load = jnp.array([[5.0, 1, 9, 1, 1]])
    complete = jax.jit(partial(complete_plan, topology=topology))
    new = np.asarray(complete(load, jnp.asarray(old), live))[0]
    np.testing.assert_array_equal(new[old[0] >= 0], old[0][old[0] >= 0])
    assert sorted(new[old[0] < 0].tolist()) == [2, 2]
    dead = np.asarray(complete(load, jnp.asarray(old), live.at[1].set(False)))
    assert dead[0, 2:4].tolist() == [-1, -1]
    assert set(dead[0].tolist()) == {-1, 0, 1, 2, 3, 4}


def test_another_mask_compiles_nothing_outside_of_jit_either():
    old, size = plan(LOAD, TOPOLOGY, **OPTIONS), next_plan.elastic_plan.__wrapped__._cache_size
    plan(LOAD, TOPOLOGY, previous=old, active=[1, 0, 1, 1, 1, 1, 1, 1], **OPTIONS)
    before = size()
    plan(LOAD, TOPOLOGY, previous=old, active=[1, 1, 1, 1, 0, 1, 1, 0], max_moves=3, **OPTIONS)
    assert size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": [True] * 7}, r"active must have the shape \(8,\), got \(7,\)"),
        ({"active": [1, 1, 1, 1, 1, 0, 0, 0]}, "5 of 8 GPUs with 30 slots for 32 experts; 2 slots"),
        ({"speed": [1, 1, 1, 1, 1, 1, 1, 0]}, "speed of GPU 7 is 0.0; speeds must be finite"),
        ({"previous": np.zeros((3, 40), int)}, "no GPUs of 6 slots; nearest: 36, 42"),
        ({"previous": np.zeros((3, 42), int), "previous_gpus": [0] * 8}, "must be distinct"),
        ({"previous": np.zeros((3, 42), int), "previous_gpus": [0]}, "has 1 numbers for 8 GPUs"),
        ({"previous_gpus": range(8)}, "previous_gpus needs previous"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plan(LOAD, TOPOLOGY, **options, **OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": [1, 2]}, "slots has 2 numbers for 4 GPUs"),
        ({"slots": 2, "nodes": [0, 1, 0, 1]}, r"must ascend .*; nearest: \(0, 0, 1, 1\)"),
        ({"slots": 2, "num_nodes": 3}, "num_nodes=3 does not divide num_gpus=4; nearest: 2, 4, or"),
        ({"slots": 2, "num_nodes": 3, "nodes": [0, 0, 0, 1]}, "nodes has 2; nearest: 2"),
    ],
)
def test_topologies_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Topology(4, **arguments)


def test_spare_slots_that_do_nothing_are_told():
    with pytest.warns(UserWarning, match='1 slots of every node do nothing.*"global" uses them'):
        eplb_jax.rebalance_experts(lognormal(2, 64), 72, 8, 8, 8, strategy="greedy")


def test_too_few_slots_inside_jit_end_with_as_many_experts_as_fit():
    step = jax.jit(lambda active: plan(LOAD, TOPOLOGY, active=active, **OPTIONS).phy2log)
    held = np.asarray(step(np.arange(8) < 4))
    assert np.all(held[:, 24:] == -1)
    assert all(len(set(x)) == 24 for x in held[:, :24])


def test_a_limit_holds_layer_by_layer_whatever_other_layers_lack():
    old = np.array(plan(LOAD, TOPOLOGY, **OPTIONS).phy2log)
    old[1] = np.resize(np.arange(20), 48)  # lacks twelve experts, and needs as many moves
    limits = OPTIONS | {"max_moves": 2, "active": np.ones(8, bool)}
    load = LOAD * np.random.default_rng(0).lognormal(0, 0.3, LOAD.shape).astype(np.float32)
    every = plan(load, TOPOLOGY, previous=old, **limits)
    assert np.asarray(moves(old, every, TOPOLOGY).received).sum(axis=1)[[0, 2]].max() <= 2
    complete = np.stack([old[0], np.resize(np.arange(32), 48), old[2]])
    beside = plan(load, TOPOLOGY, previous=complete, **limits)
    np.testing.assert_array_equal(beside.phy2log[::2], every.phy2log[::2])
