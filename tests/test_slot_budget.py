"""Curves of time against spare slots, budgets over layers, and one number of slots for all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Cost, Topology
from eplb_jax.evaluation import slots_curve as curves
from eplb_jax.evaluation.slot_budget import least_time
from eplb_jax.planning.replication import replicate
from tests.helpers import lognormal

L, E, G = 5, 12, 4
TOPOLOGY = Topology(G, slots=5)
LOAD = np.round(100 * lognormal(L, E, sigma=1.5))
JUDGED = np.round(100 * lognormal(2 * L, E, sigma=1.5, seed=1)).reshape(2, L, E)


def test_budgets_are_the_best_of_all_splits():
    rng = np.random.default_rng(0)
    for shape in ((1, 4), (3, 5), (4, 4)):
        layers, points = shape
        curve = rng.normal(size=shape)
        ways = np.array(list(itertools.product(range(points), repeat=layers)))
        time = curve[np.arange(layers), ways].sum(axis=1)
        for total in range(layers * points):
            spares = least_time(curve, total)
            assert spares.sum() <= total
            best = time[ways.sum(axis=1) <= total].min()
            assert curve[np.arange(layers), spares].sum() == pytest.approx(best, abs=1e-12)
    assert least_time(np.ones((3, 4)), 7).tolist() == [0, 0, 0]  # what gains nothing is not used


@pytest.mark.parametrize("cost", [None, Cost(per_token=0.5, per_active_expert=20, tile=16)])
def test_curves_are_the_times_of_valid_plans(cost):
    most = 9
    curve = np.asarray(eplb_jax.slots_curve(LOAD, JUDGED, TOPOLOGY, most, cost=cost))
    assert curve.shape == (L, most + 1)

    def time(tokens, count):
        if cost is None:
            return tokens / count
        each = np.ceil(tokens / count / cost.tile) * cost.tile
        return cost.per_token * each + cost.per_active_expert * np.minimum(tokens / count, 1)

    made = jax.jit(curves._plan, static_argnums=(4, 5))
    for r in range(most + 1):
        count = np.asarray(replicate(jnp.asarray(LOAD), E + r, G).logcnt)
        weight = jnp.asarray(time(LOAD, count), jnp.float32).T
        given = weight, weight[None], jnp.asarray(count.T), jnp.int32(E + r)
        plan = np.asarray(made(*given, G, E + most))
        for layer in range(L):
            gpus = [x[x < E] for x in plan[:, :, layer].T]
            np.testing.assert_array_equal(np.bincount(np.concatenate(gpus)), count[layer])
            assert all(len(set(x.tolist())) == len(x) for x in gpus)
            assert max(map(len, gpus)) == -(-(E + r) // G)
            assert min(map(len, gpus)) == (E + r) // G
            each = time(JUDGED[:, layer], count[layer])
            loads = np.stack([each[:, x].sum(axis=1) for x in gpus])
            assert curve[layer, r] == pytest.approx(loads.max(axis=0).mean(), rel=1e-5)


def test_plans_of_curves_do_not_see_what_they_are_judged_by():
    curve, one, two = (
        np.asarray(eplb_jax.slots_curve(LOAD, x, TOPOLOGY, 6)) for x in (JUDGED, *JUDGED)
    )
    np.testing.assert_allclose(curve, (one + two) / 2, rtol=1e-6)
    windows = np.concatenate([JUDGED, 2 * JUDGED[::-1]])
    budget = eplb_jax.spread_slots(windows, None, TOPOLOGY, 6)
    halves = windows[0::2], windows[1::2]
    wanted = [
        np.asarray(eplb_jax.slots_curve(x, y, TOPOLOGY, 6)) for x, y in (halves, halves[::-1])
    ]
    np.testing.assert_allclose(budget.curve, np.mean(wanted, axis=0), rtol=1e-6)
    assert budget.spares.sum() <= 6
    chosen = budget.curve[np.arange(L), budget.spares]
    assert budget.time == pytest.approx(chosen.sum())
    np.testing.assert_array_equal(budget.spares, least_time(budget.curve, 6))


def test_a_layer_gets_at_most_the_slots_of_the_topology():
    load = np.ones((2, E))
    load[0, 0] = 1000
    budget = eplb_jax.spread_slots(load, load, Topology(G, slots=4), 100)
    assert budget.curve.shape == (2, 5)
    assert budget.spares.tolist() == [3, 0]


def test_slots_are_chosen_by_time_per_token():
    load = [[8, 1, 1, 2]]
    options = {"experts_per_token": 2, "memory_bytes": 120, "bytes_per_expert": 20}
    options |= {"kv_bytes_per_token": 1, "tokens_per_sequence": 10}

    def choose(slots=(2, 3, 4), **more):
        return eplb_jax.choose_slots(load, load, Topology(2, 2), slots, **(options | more))

    reads = Cost(per_token=1e-9, per_active_expert=1.0)
    choice = choose(cost=reads)
    assert [x.batch for x in choice.options] == [8, 6, 4]
    for option in choice.options:
        assert option.seconds_per_token == option.step_seconds / (2 * option.batch)
    assert choice.slots == 2  # more replicas are more weights to read
    balanced = choose(cost=Cost(per_token=1.0))
    assert balanced.slots == 3  # as good as 4: 8 of 12 tokens are for one expert
    first, _, last = balanced.options
    # 8 sequences on 2 GPUs: 32 tokens a step, 9 of 12 on one GPU; 4 and 16, half of them.
    assert first.step_seconds == pytest.approx(32 * 9 / 12, rel=1e-5)
    assert last.step_seconds == pytest.approx(16 / 2, rel=1e-5)
    assert choose(cost=Cost(per_token=1e-6), other_seconds=1.0).slots == 2
    assert choose(cost=Cost(per_token=1e-6), other_seconds=1.0, most_sequences=4).slots == 3
    with pytest.raises(ValueError, match=r"memory_bytes=30 hold no sequence .* nearest: 50"):
        choose(cost=reads, memory_bytes=30)
    with pytest.raises(ValueError, match=r"slots=5, but there are 4 experts .* nearest: 4"):
        choose(cost=reads, slots=[5])
    with pytest.raises(ValueError, match="slots=1 is less than 2"):
        choose(cost=reads, slots=[1])
    with pytest.raises(ValueError, match="slots is empty"):
        choose(cost=reads, slots=[])
    with pytest.raises(TypeError, match="cost must be"):
        choose(cost=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: eplb_jax.slots_curve(LOAD, LOAD[1:], TOPOLOGY, 3),
            r"judged must have .*\(5, 12\)",
        ),
        (lambda: eplb_jax.slots_curve(LOAD, LOAD, TOPOLOGY, 37), "most_spares=37.*nearest: 36"),
        (lambda: eplb_jax.slots_curve(LOAD, LOAD, TOPOLOGY, -1), "most_spares=-1"),
        (lambda: eplb_jax.spread_slots(LOAD, None, TOPOLOGY, -1), "total_spares=-1"),
        (lambda: eplb_jax.spread_slots(LOAD, None, Topology(4, 2), 1), "8 slots for 12 experts"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
