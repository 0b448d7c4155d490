"""Plans for a flexible split: the value against HiGHS, and what the search may and must do."""

import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, metrics
from tests.helpers import lognormal
from tests.test_splitting import CASES, least_max

TRACE = eplb_jax.loads.example("gpt_oss_20b")
TOPOLOGY = Topology(8, slots=5)


def random_plan(rng, num_experts, num_gpus, slots):
    """Every expert once, and spare slots at random, duplicates on a GPU too."""
    spare = rng.integers(0, num_experts, num_gpus * slots - num_experts)
    return rng.permutation(np.r_[np.arange(num_experts), spare])


@pytest.mark.parametrize(("num_gpus", "slots"), [(2, 3), (4, 3), (8, 5), (12, 4)])
def test_the_bound_of_a_split_is_its_optimum(num_gpus, slots):
    rng = np.random.default_rng(0)
    num_experts = num_gpus * slots - num_gpus // 2
    plans = np.stack([random_plan(rng, num_experts, num_gpus, slots) for _ in range(8)])
    load = lognormal(8, num_experts, seed=1)
    load[0, 1:], load[1] = 0, 1  # one expert has all load, or all the same
    bound = eplb_jax.split_bound(load, plans, num_gpus)
    exact = [least_max(x.astype(float), y, num_gpus) for x, y in zip(load, plans, strict=True)]
    np.testing.assert_allclose(bound, exact, rtol=1e-5)
    reached = metrics.gpu_loads(load, plans, num_gpus, split="flexible").max(axis=1)
    assert np.all(np.asarray(reached) >= np.asarray(bound) * (1 - 1e-5))
    assert np.all(np.asarray(reached) <= np.asarray(bound) * 1.005)


@pytest.mark.parametrize("case", ["many replicas", "twenty replicas", "chain"])
def test_with_more_gpus_the_bound_is_below_the_optimum_and_near(case):
    load, plan, num_gpus = CASES[case]()
    bound = np.asarray(eplb_jax.split_bound(load, plan, num_gpus))
    phy2log = np.asarray(plan.phy2log)
    exact = [
        least_max(np.asarray(x, float), y, num_gpus) for x, y in zip(load, phy2log, strict=True)
    ]
    assert np.all(bound <= np.array(exact) * (1 + 1e-5))
    assert np.all(bound >= np.array(exact) * 0.995)


@pytest.mark.quality
@pytest.mark.parametrize(
    ("num_gpus", "slots"), [(3, 2), (6, 4), (10, 3), (12, 6), (16, 5), (24, 3), (32, 9), (64, 2)]
)
def test_bound_and_split_of_many_random_layers(num_gpus, slots):
    """40 of each shape, of all kinds of loads; replicas anywhere, or on the next GPU, as chains."""
    rng = np.random.default_rng(num_gpus)
    num_experts = num_gpus * (slots - 1)  # as many as a ring has
    kinds = [
        rng.lognormal(0, 1, (10, num_experts)),
        rng.lognormal(0, 3, (10, num_experts)),
        rng.choice([0.5, 1.5], (10, num_experts)),
        rng.random((10, num_experts)) * (rng.random((10, num_experts)) < 0.3) + 1e-3,
    ]
    load = np.concatenate(kinds).astype(np.float32)
    plans = np.stack([random_plan(rng, num_experts, num_gpus, slots) for _ in load])
    ring = np.stack([np.arange(num_gpus), np.roll(np.arange(num_gpus), 1)], axis=1)
    own = np.arange(num_gpus, num_gpus * (slots - 1)).reshape(num_gpus, slots - 2)
    plans[::4] = np.concatenate([ring, own], axis=1).reshape(-1)
    bound = np.asarray(eplb_jax.split_bound(load, plans, num_gpus))
    exact = [least_max(x.astype(float), y, num_gpus) for x, y in zip(load, plans, strict=True)]
    exact, reached = np.array(exact), metrics.gpu_loads(load, plans, num_gpus, split="flexible")
    assert np.all(bound <= exact * (1 + 1e-5))
    assert np.all(bound >= exact * (1 - 1e-5 if num_gpus <= 12 else 0.995))
    assert np.all(np.asarray(reached).max(axis=1) <= exact * 1.005)


@pytest.fixture(scope="module")
def history():
    history = eplb_jax.init_history(24, 32)
    for window in TRACE[:16]:
        history = eplb_jax.update_history(history, window)
    return history


@pytest.fixture(scope="module")
def flexible(history):
    return eplb_jax.plan(history, TOPOLOGY, split="flexible")


def imbalance(load, plan, topology=TOPOLOGY):
    bound = np.asarray(eplb_jax.split_bound(load, plan, topology))
    mean = np.asarray(load).sum(axis=-1) / topology.num_gpus
    return bound / mean - 1


def check_valid(plan, num_experts, num_gpus):
    for layer in np.asarray(plan.phy2log):
        assert set(layer) == set(range(num_experts))
        assert all(len(set(gpu)) == len(gpu) for gpu in layer.reshape(num_gpus, -1))
    eplb_jax.check_placement(plan)


def test_it_holds_on_the_next_window(history, flexible):
    check_valid(flexible, 32, 8)
    even = eplb_jax.plan(history, TOPOLOGY)
    assert imbalance(TRACE[8:16], flexible).mean() < 0.003
    assert imbalance(TRACE[16], flexible).mean() < 0.6 * imbalance(TRACE[16], even).mean()


@pytest.mark.parametrize(
    ("topology", "load", "part"),
    [
        (Topology(4, slots=5), lognormal(18, 16, seed=3), 0.5),
        (Topology(12, slots=3, num_nodes=2, num_groups=4), lognormal(18, 24, seed=4), 0.8),
    ],
    ids=["all sets", "tight sets, nodes"],
)
def test_never_worse_in_the_windows_given(topology, load, part):
    windows = np.sqrt(load).reshape(6, 3, load.shape[-1])
    plan = eplb_jax.plan(windows, topology, split="flexible", weights="equal")
    num_experts = load.shape[-1]
    check_valid(plan, num_experts, topology.num_gpus)
    even = eplb_jax.plan(windows, topology, weights="equal")
    squares = [np.sum(imbalance(windows, x, topology) ** 2, axis=0) for x in (plan, even)]
    assert np.all(squares[0] <= squares[1] + 1e-4)
    assert squares[0].sum() < part * squares[1].sum()
    if topology.num_nodes > 1:
        groups = np.asarray(plan.phy2log) // (num_experts // topology.num_groups)
        of_node = groups.reshape(len(groups), 2, -1)
        assert all(len(set(node)) == 2 for layer in of_node for node in layer)
        assert all(set(x) & set(y) == set() for x, y in of_node)


def test_the_plan_of_a_layer_does_not_depend_on_the_others():
    topology = Topology(4, slots=5)
    load = np.sqrt(lognormal(18, 16, seed=3)).reshape(6, 3, 16)
    options = {"split": "flexible", "weights": "equal"}
    together = np.asarray(eplb_jax.plan(load, topology, **options).phy2log)
    others = np.stack([load[:, 2] ** 2, load[:, 1], np.ones((6, 16))], axis=1)
    beside = np.asarray(eplb_jax.plan(others, topology, **options).phy2log)
    np.testing.assert_array_equal(beside[1], together[1])
    moved = eplb_jax.plan(load[:, [1, 2, 0]], topology, **options).phy2log
    np.testing.assert_array_equal(moved, together[[1, 2, 0]])


def test_the_plan_in_place_is_the_start(history, flexible):
    again = eplb_jax.plan(TRACE[8:16], TOPOLOGY, split="flexible", previous=flexible)
    idle = TRACE[16:24].copy()
    idle[:, 3] = 0
    worse = []
    for most in (0, 1, 3, None):
        plan = eplb_jax.plan(idle, TOPOLOGY, split="flexible", previous=again, max_moves=most)
        moved = np.asarray(eplb_jax.moves(again, plan, TOPOLOGY).received).sum(axis=1)
        assert moved.max() <= (40 if most is None else most)
        np.testing.assert_array_equal(plan.phy2log[3], again.phy2log[3])
        check_valid(plan, 32, 8)
        worse.append(np.nanmean(imbalance(np.where(idle > 0, idle, 1), plan)))
    assert worse[0] > worse[1] > worse[2] > worse[3]
    same = eplb_jax.plan(idle, TOPOLOGY, split="flexible", previous=plan)
    assert np.mean(np.asarray(same.phy2log) == plan.phy2log) > 0.97


def test_what_takes_it(flexible, history):
    even = eplb_jax.plan(history, TOPOLOGY)
    planner = eplb_jax.plan_from_history(TOPOLOGY, split="flexible", keep=False)
    result = eplb_jax.replay(
        TRACE[:18], planner, TOPOLOGY, window=16, all_past=True, split="flexible"
    )
    wanted = metrics.balance(TRACE[16], flexible, TOPOLOGY, split="flexible").imbalance
    np.testing.assert_allclose(result.imbalance[0], wanted, atol=1e-6)
    costs = {"bytes_per_expert": 1, "bandwidth": 1e9, "seconds_per_token": 1, "serves": 100}
    answer = eplb_jax.decide(TRACE[16:20], even, flexible, TOPOLOGY, split="flexible", **costs)
    gain = [
        metrics.gpu_loads(TRACE[16:20], x, TOPOLOGY, split="flexible").max(axis=2).sum() / 4
        for x in (even, flexible)
    ]
    assert answer.gain == pytest.approx(float(gain[0] - gain[1]), rel=1e-4)
    gap = np.asarray(metrics.gap(TRACE[16], flexible, TOPOLOGY, split="flexible"))
    assert np.all(gap >= 0)
    assert gap.mean() <= imbalance(TRACE[16], flexible).mean() + 1e-4
    curve = eplb_jax.spares_curve(
        history, TRACE[16:20], Topology(8, slots=9), [5], split="flexible"
    )
    judged = metrics.balance(TRACE[16:20], flexible, TOPOLOGY, split="flexible")
    assert curve == (eplb_jax.Spares(5, pytest.approx(float(judged.mean_imbalance))),)
    # Two experts with all load in 4 slots: half the load of each is the least there is.
    bound = eplb_jax.plan_bound([6, 6, 0, 0], Topology(3, slots=2), split="flexible")
    assert float(bound) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "even"}, "split='even' is not known; nearest: split=\"flexible\""),
        ({"split": "flexible", "speed": np.ones(8)}, "needs equal GPUs that are all alive"),
        ({"split": "flexible", "active": np.arange(8) < 7}, "needs equal GPUs that are all alive"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        eplb_jax.plan(TRACE[0], TOPOLOGY, **options)
    with pytest.raises(ValueError, match="split='half' is not known"):
        metrics.balance(
            TRACE[0], eplb_jax.placement_of(np.arange(32)[None].repeat(24, 0)), 8, split="half"
        )
