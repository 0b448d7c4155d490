"""Plans with a number of spare slots for every layer, and everything that takes such plans."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import eplb_jax
from eplb_jax import Topology, formats, metrics, runtime
from tests.helpers import QUICK, assert_bits, lognormal

L, E, G = 5, 12, 4
TOPOLOGY = Topology(G, slots=5)
LOAD = np.round(100 * lognormal(L, E, sigma=1.5))
SPARES = [0, 3, 8, 5, 1]


@pytest.fixture(scope="module")
def plan():
    return eplb_jax.plan_layers(LOAD, TOPOLOGY, SPARES, strategy=QUICK)


def held_of(plan, num_gpus=G):
    """Whether a slot of a GPU holds an expert, [L, G, slots]."""
    return np.asarray(plan.phy2log).reshape(len(plan.phy2log), num_gpus, -1) >= 0


def assert_valid(plan, spares, num_experts, num_gpus):
    eplb_jax.check_placement(plan)
    held = held_of(plan, num_gpus)
    used = num_experts + np.asarray(spares)
    np.testing.assert_array_equal(held.sum(axis=(1, 2)), used)
    of_gpu = held.sum(axis=2)
    np.testing.assert_array_equal(of_gpu.max(axis=1), -(-used // num_gpus))
    np.testing.assert_array_equal(of_gpu.min(axis=1), used // num_gpus)
    assert np.ptp(of_gpu.sum(axis=0)) == (used.sum() % num_gpus > 0)
    assert np.all(np.diff(held.astype(int), axis=2) <= 0)  # empty slots are the last
    for gpu in np.asarray(plan.phy2log).reshape(-1, held.shape[2]):
        experts = gpu[gpu >= 0].tolist()
        assert len(set(experts)) == len(experts)


@pytest.mark.parametrize("strategy", [QUICK, "greedy"])
@pytest.mark.parametrize("windows", [False, True])
def test_all_gpus_hold_the_same_total(strategy, windows):
    spares = np.random.default_rng(0).integers(0, 9, 16)
    load = lognormal(32, E, sigma=1.5).reshape(2, 16, E)
    load[:, 3] = 0
    plan = eplb_jax.plan_layers(load if windows else load[0], TOPOLOGY, spares, strategy=strategy)
    assert_valid(plan, spares, E, G)


def test_two_slots_a_gpu_search_for_counts_around_empty_slots():
    load, spares = lognormal(6, 20, sigma=1.0), [4, 7, 11, 12, 0, 9]
    topology = Topology(16, slots=2)
    plans = [eplb_jax.plan_layers(load, topology, spares, strategy=x) for x in ("fast", QUICK)]
    for plan in plans:
        assert_valid(plan, spares, 20, 16)
    searched, greedy = (metrics.balance(load, x, topology).imbalance for x in plans)
    assert np.all(searched <= greedy + 1e-6)
    assert searched.mean() < 0.98 * greedy.mean()


def test_groups_stay_on_their_nodes_which_hold_the_same_total():
    topology = Topology(G, slots=5, num_nodes=2, num_groups=4)
    spares = [0, 1, 2, 3, 5, 7, 8, 1]
    load = lognormal(8, E, sigma=1.5)
    load[6, :3] = 0
    plan = eplb_jax.plan_layers(load, topology, spares, strategy=QUICK)
    assert_valid(plan, spares, E, G)
    for experts in np.asarray(plan.phy2log).reshape(8, 2, -1):
        one, two = ({int(e) // 3 for e in node if e >= 0} for node in experts)
        assert not one & two


def test_whole_gpus_of_spares_are_planned_as_by_plan():
    for slots in (4, 5):
        topology = Topology(G, slots=slots)
        spares = [slots * G - E] * L
        plan = eplb_jax.plan_layers(LOAD, topology, spares, strategy=QUICK)
        np.testing.assert_array_equal(
            plan.phy2log, eplb_jax.plan(LOAD, topology, strategy=QUICK).phy2log
        )


def test_moves_decisions_and_balance(plan):
    other = eplb_jax.plan_layers(LOAD[:, ::-1], TOPOLOGY, SPARES, strategy=QUICK)
    found = eplb_jax.moves(plan, other, TOPOLOGY)
    old, new = (np.asarray(x.phy2log) for x in (plan, other))
    layer = np.arange(L)[:, None]
    source = np.asarray(found.source)
    np.testing.assert_array_equal(old[layer, source][new >= 0], new[new >= 0])
    assert not np.asarray(found.copies)[:, 4].any()  # nothing from storage
    loads = np.zeros((L, G))
    share = LOAD / np.asarray(plan.logcnt)
    for i, slot in np.argwhere(old >= 0):
        loads[i, slot // TOPOLOGY.slots] += share[i, old[i, slot]]
    balance = metrics.balance(LOAD, plan, TOPOLOGY)
    np.testing.assert_allclose(balance.gpu_load, loads, rtol=1e-5)
    windows = np.stack([LOAD, 1.1 * LOAD])
    cost = {"bytes_per_expert": 1, "bandwidth": 1e9, "serves": 9, "seconds_per_token": 1.0}
    for split in (None, "flexible"):
        answer = eplb_jax.decide(windows, other, plan, TOPOLOGY, split=split, **cost)
        assert answer.action == "apply"
        assert answer.gain > 0


def test_tokens_go_to_slots_that_hold_their_expert(plan):
    ids = np.random.default_rng(0).integers(0, E, (200, 3))
    phy2log = np.asarray(plan.phy2log)
    shares = runtime.split_load(LOAD, plan, TOPOLOGY)
    assert not np.asarray(shares)[phy2log < 0].any()
    flexible = metrics.gpu_loads(LOAD, plan, TOPOLOGY, split=shares).max(axis=1)
    equal = metrics.gpu_loads(LOAD, plan, TOPOLOGY).max(axis=1)
    bound = eplb_jax.split_bound(LOAD, plan, TOPOLOGY)
    assert np.all(flexible <= equal * (1 + 1e-5))
    np.testing.assert_allclose(flexible, bound, rtol=5e-3)
    table = runtime.nearest_replica(plan, TOPOLOGY)
    for i in (1, 2):
        more = {
            "nearest": {"table": table[i], "gpu": 1},
            "shares": {"shares": shares[i]},
            "random": {"key": jax.random.key(0)},
        }
        for choice in ("round_robin", "token", "random", "nearest", "shares"):
            slots = runtime.to_physical(ids, plan.layer(i), choice, **more.get(choice, {}))
            np.testing.assert_array_equal(phy2log[i][np.asarray(slots)], ids, choice)
    slots = runtime.to_physical(ids, plan.layer(4))
    counts = runtime.expert_counts_from_slots(slots, plan.layer(4), E)
    np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=E))
    ones = runtime.slot_to_expert_counts(jnp.ones(plan.phy2log.shape, jnp.int32), plan, E)
    np.testing.assert_array_equal(ones, plan.logcnt)
    tokens = runtime.quotas(LOAD.astype(int), plan, shares).tokens
    assert not np.asarray(tokens)[phy2log < 0].any()
    np.testing.assert_array_equal(runtime.slot_to_expert_counts(tokens, plan, E), LOAD)


def test_weights_follow_plans_with_empty_slots(plan):
    other = eplb_jax.plan_layers(LOAD[:, ::-1], TOPOLOGY, SPARES[::-1], strategy=QUICK)
    mesh = jax.make_mesh((G,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:G])
    weights = {"up": np.random.default_rng(0).normal(size=(L, E, 3)).astype(np.float32)}

    def rows(plan):
        phy2log = np.asarray(plan.phy2log)
        found = weights["up"][np.arange(L)[:, None], phy2log]
        return {"up": np.where(phy2log[:, :, None] < 0, 0, found)}

    for given in (weights, jax.tree.map(jnp.asarray, weights)):
        slots = runtime.to_slots(given, plan, mesh)
        assert_bits(slots, rows(plan))
    assert_bits(runtime.to_logical(slots, plan, mesh), weights)
    moved, after = runtime.relocate(slots, plan, other, mesh)
    used = np.asarray(other.phy2log) >= 0
    np.testing.assert_array_equal(np.asarray(moved["up"])[used], rows(other)["up"][used])
    assert_bits(runtime.to_logical(moved, after, mesh), weights)
    mixed = runtime.select_layers(plan, other, np.arange(L) < 2)
    eplb_jax.check_placement(mixed)

    masked = np.asarray(runtime.mask_replicas(slots, plan)["up"])
    np.testing.assert_allclose(masked.sum(axis=1), weights["up"].sum(axis=1), rtol=1e-5)
    sums = np.asarray(runtime.sum_replicas(slots, plan, mesh)["up"])
    wanted = (
        rows(plan)["up"] * np.asarray(plan.logcnt)[np.arange(L)[:, None], plan.phy2log][..., None]
    )
    np.testing.assert_allclose(sums, wanted, rtol=1e-6)

    def total(logical):
        return jnp.sum(runtime.to_slots(logical, plan, mesh)["up"] * 2)

    gradient = jax.grad(total)(jax.tree.map(jnp.asarray, weights))["up"]
    np.testing.assert_allclose(gradient[..., 0], 2.0 * np.asarray(plan.logcnt), rtol=1e-6)


def test_files_keep_empty_slots_or_name_the_format_that_cannot(plan, tmp_path):
    file = formats.PlanFile(np.asarray(plan.phy2log), tuple(range(L)), E, TOPOLOGY, L)
    path = tmp_path / "plan.json"
    path.write_bytes(formats.write_plan(file, "eplb-jax"))
    assert "-1" in json.dumps(json.loads(path.read_text())["phy2log"])
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, plan.phy2log)
    assert found.topology == TOPOLOGY
    systems = {"sglang": "SGLang", "vllm": "vLLM", "vllm-map": "vLLM", "ascend": "vllm-ascend"}
    systems |= {"tensorrt-llm": "TensorRT-LLM", "verl": "verl"}
    written = {name for name, x in formats.FORMATS.items() if x.write_plan is not None}
    assert written == {*systems, "eplb-jax"}
    for name, system in systems.items():
        with pytest.raises(ValueError, match=system):
            formats.write_plan(file, name)


@pytest.mark.parametrize(
    ("load", "topology", "spares", "message"),
    [
        (LOAD, TOPOLOGY, [1, 2], r"spares must have the shape \(5,\)"),
        (LOAD, TOPOLOGY, [0, 9, 0, 0, 0], "layer 1 are 9.*nearest: 8"),
        (LOAD, TOPOLOGY, [0, 0, -1, 0, 0], "layer 2 are -1.*nearest: 0"),
        (LOAD[0], TOPOLOGY, [1], "load must have the shape"),
        (LOAD, Topology(2, [4, 8]), [0] * L, "equally many slots"),
    ],
)
def test_errors(load, topology, spares, message):
    with pytest.raises(ValueError, match=message):
        eplb_jax.plan_layers(load, topology, spares)


def test_spares_must_be_integers():
    with pytest.raises(TypeError, match="spares must be integers, got dtype float64"):
        eplb_jax.plan_layers(LOAD, TOPOLOGY, [1.5] * L)
