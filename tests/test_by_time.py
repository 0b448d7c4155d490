"""Plans by the time of GPUs: active experts, tokens, tiles, and empty slots."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Cost, Topology
from eplb_jax.planning.cost import curve_of, time_loads
from tests.helpers import lognormal

TOPOLOGY = Topology(8, slots=5, num_nodes=2, num_groups=4)
RATES = lognormal(3, 32, seed=1) / lognormal(3, 32, seed=1).sum(axis=1, keepdims=True)
READS = Cost(per_token=0, per_active_expert=1, tokens_per_step=64)
TOKENS = Cost(per_token=1, tokens_per_step=64)
BOTH = Cost(per_token=1, per_active_expert=2, tokens_per_step=64)


def draw(windows, tokens, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([[rng.multinomial(tokens, p / p.sum()) for p in RATES] for _ in range(windows)])


PAST, STEPS = draw(6, 4096), draw(48, 64, seed=1)
plan = partial(eplb_jax.plan, PAST, TOPOLOGY, policy="global", strategy="fast")


def seconds(phy2log, cost, steps=STEPS):
    """The time of the GPU that takes most, mean over steps; replicas take tokens in turn."""
    phy2log, most = np.asarray(phy2log), []
    for layer, slots in enumerate(phy2log):
        held = slots >= 0
        count = np.bincount(slots[held], minlength=32)
        rank = np.array([np.sum(slots[:i] == x) for i, x in enumerate(slots)])
        load = steps[:, layer][:, slots]
        mine = load // np.maximum(count[slots], 1) + (rank < load % np.maximum(count[slots], 1))
        mine = np.where(held, mine, 0)
        time = cost.per_active_expert * (mine > 0)
        time = time + cost.per_token * np.ceil(mine / cost.tile) * cost.tile
        most.append(time.reshape(len(steps), 8, -1).sum(axis=-1).max(axis=-1).mean())
    return np.mean(most)


def test_where_reading_weights_costs_replicas_are_not_used():
    by_time = plan(cost=READS)
    phy2log = np.asarray(by_time.phy2log)
    np.testing.assert_array_equal(by_time.logcnt, 1)
    assert ((phy2log >= 0).sum(axis=1) == 32).all()
    alone = np.tile(np.arange(32), (3, 1)).reshape(3, 8, 4)
    alone = np.concatenate([alone, np.full((3, 8, 1), -1)], axis=2).reshape(3, 40)
    assert seconds(phy2log, READS) <= seconds(alone, READS)
    assert seconds(plan().phy2log, READS) > 1.1 * seconds(alone, READS)


def test_where_only_tokens_cost_it_is_as_good_as_a_plan_for_tokens():
    assert seconds(plan(cost=TOKENS).phy2log, TOKENS) < 1.02 * seconds(plan().phy2log, TOKENS)


def test_between_them_it_is_better_than_both():
    none = plan(cost=READS)
    time = seconds(plan(cost=BOTH).phy2log, BOTH)
    assert time < seconds(plan().phy2log, BOTH)
    assert time < 1.01 * seconds(none.phy2log, BOTH)


def test_tiles():
    """In a step of 512 tokens every replica takes a tile, however few tokens it has."""
    cost = Cost(per_token=1, tile=128, tokens_per_step=512)
    past, steps = draw(6, 65536), draw(24, 512, seed=2)
    by_time = eplb_jax.plan(past, TOPOLOGY, policy="global", strategy="fast", cost=cost)
    by_tokens = eplb_jax.plan(past, TOPOLOGY, policy="global", strategy="fast")
    after, before = (seconds(x.phy2log, cost, steps) for x in (by_time, by_tokens))
    assert after < 0.85 * before


def test_no_expert_is_lost():
    """As some were, with the flags that tests compile with, where kernels rounded floats apart."""
    eplb_jax.check_placement(plan(cost=Cost(1, 3, 128, 512)))


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_every_layer_is_planned_as_if_alone(policy):
    options = {"policy": policy, "strategy": "fast", "cost": BOTH}
    whole = eplb_jax.plan(PAST, TOPOLOGY, **options)
    eplb_jax.check_placement(whole)
    others = eplb_jax.plan(PAST[:, [2, 1, 1]], TOPOLOGY, **options)
    np.testing.assert_array_equal(others.phy2log, whole.phy2log[np.array([2, 1, 1])])
    if policy == "hierarchical":
        group = np.where(whole.phy2log < 0, -1, np.asarray(whole.phy2log) // 8)
        for layer in group.reshape(3, 2, 20):
            assert not (set(layer[0]) & set(layer[1])) - {-1}
    else:
        alone = eplb_jax.plan(PAST[:, 1:2], TOPOLOGY, **options)
        np.testing.assert_array_equal(whole.phy2log[1:2], alone.phy2log)


def test_the_plan_in_place_is_kept_where_it_is_nearly_as_good():
    old, later = plan(cost=BOTH), draw(6, 4096, seed=5)
    options = {"policy": "global", "strategy": "fast", "cost": BOTH}
    again = eplb_jax.plan(later, TOPOLOGY, previous=old, tolerance=1.0, **options)
    np.testing.assert_array_equal(again.phy2log, old.phy2log)
    other = eplb_jax.plan(PAST[:, ::-1], TOPOLOGY, previous=old, **options)
    fresh = eplb_jax.plan(PAST[:, ::-1], TOPOLOGY, **options)
    moved, unnumbered = (eplb_jax.moves(old, x, TOPOLOGY).received for x in (other, fresh))
    assert moved.sum() < unnumbered.sum()
    np.testing.assert_array_equal(other.logcnt, fresh.logcnt)


def test_a_service_proposes_by_time():
    service = eplb_jax.balancer(TOPOLOGY, policy="global", strategy="fast", cost=READS)
    state = service.init(3, 32)
    for window in PAST:
        state = service.observe(state, window)
    proposal = service.propose(state)
    np.testing.assert_array_equal(proposal.plan.logcnt, 1)  # it begins with 8 replicas
    assert np.all(np.asarray(proposal.time) < proposal.time_in_place)
    loads = np.asarray(eplb_jax.metrics.gpu_loads(PAST, proposal.plan, TOPOLOGY, cost=READS))
    np.testing.assert_allclose(proposal.time, loads.max(axis=-1).mean(axis=0), rtol=0.1)
    again = service.propose(service.commit(state, proposal))
    assert set(again.reasons()) == {"near enough"}
    with pytest.raises(ValueError, match="cost takes no elastic"):
        eplb_jax.balancer(TOPOLOGY, cost=READS, elastic=True)


@pytest.mark.parametrize("cost", [READS, TOKENS, BOTH, Cost(1, 3, 16, 512)])
def test_no_plan_is_below_the_bound(cost):
    load, curve = PAST.sum(axis=0).astype(np.float32), curve_of(cost)
    gaps = [eplb_jax.metrics.gap(load, x, TOPOLOGY, cost=cost) for x in (plan(cost=cost), plan())]
    assert np.all(np.array(gaps) >= -1e-5)
    assert np.all(np.array(gaps[0]) < 0.25)
    lone = np.zeros((1, 32), np.float32)
    lone[0, 3] = 64
    whole = eplb_jax.plan_bound(lone, Topology(8, slots=4), cost=cost)
    single = time_loads(jnp.asarray(lone), jnp.ones((1, 32), jnp.int32), curve)[0, 3]
    np.testing.assert_allclose(whole, single, rtol=1e-4)  # no slot to spare: it stays whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_moves": 3, "previous": "old"}, "takes no split, max_moves"),
        ({"split": "flexible"}, "takes no split"),
        ({"active": np.arange(8) > 0}, "all alive"),
    ],
)
def test_errors(options, message):
    if options.get("previous") == "old":
        options = options | {"previous": np.tile(np.resize(np.arange(32), 40), (3, 1))}
    with pytest.raises(ValueError, match=message):
        plan(cost=BOTH, **options)
