"""Metrics of a service: by hand, by the definitions of engines, and as Prometheus reads them."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import eplb_jax
from eplb_jax import Topology, metrics, monitoring
from eplb_jax.evaluation.monitoring import METRICS, Exporter, plan_metrics, window_metrics
from tests.helpers import lognormal

TOPOLOGY = Topology(8, slots=6)


def by_definition(load, phy2log, num_gpus):
    """What the engines compute, from GPU loads that are counted slot by slot."""
    windows, layers, _ = load.shape
    gpu = np.zeros((windows, layers, num_gpus))
    for layer, slots in enumerate(phy2log):
        for slot, expert in enumerate(slots):
            replicas = list(slots).count(expert)
            gpu[:, layer, slot * num_gpus // len(slots)] += load[:, layer, expert] / replicas
    mean, most = gpu.mean(axis=2), gpu.max(axis=2)
    with np.errstate(invalid="ignore"):
        over = most / mean - 1  # NaN without load, which pandas leaves out
    total = most.sum(axis=1)
    return (
        ((mean + 1e-5) / (most + 1e-5)).mean(axis=1),
        [m / x if x > 0 else 0.0 for m, x in zip(mean.sum(axis=1), total, strict=True)],
        [0.0 if np.isnan(x).all() else np.nanmean(x) for x in over],
        gpu.std(axis=2, ddof=1).mean(axis=1),
    )


def test_definitions_of_engines():
    load = np.random.default_rng(0).integers(0, 1000, (5, 4, 32))
    load[:, 1] = 0  # a dense layer
    load[2, 3] = 0
    load[4] = 0  # nothing at all
    plan = eplb_jax.plan(lognormal(4, 32), TOPOLOGY, strategy="greedy")
    result = eplb_jax.engine_metrics(load, plan, TOPOLOGY)
    for got, wanted in zip(result, by_definition(load, np.asarray(plan.phy2log), 8), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for got, window in zip(eplb_jax.engine_metrics(load[0], plan, TOPOLOGY), result, strict=True):
        assert got == pytest.approx(window[0], rel=1e-6)


def test_definitions_of_engines_by_hand():
    """Two GPUs: a layer of 100 and 300, a layer of 50 and 50, one without load."""
    each = eplb_jax.engine_metrics([[100, 300], [50, 50], [0, 0]], [[0, 1]] * 3, 2)
    np.testing.assert_allclose(each.sglang_balancedness, (200 / 300 + 1 + 1) / 3, rtol=1e-6)
    np.testing.assert_allclose(each.vllm_balancedness, (200 + 50) / (300 + 50), rtol=1e-6)
    np.testing.assert_allclose(each.tensorrt_llm_imbalance, (0.5 + 0) / 2, rtol=1e-6)
    np.testing.assert_allclose(each.tensorrt_llm_std, np.sqrt(2 * 100**2) / 3, rtol=1e-6)
    # The case of vLLM's fault: mean and max over layers would be 1.
    assert eplb_jax.engine_metrics([[100, 200]] * 2, [[0, 1]] * 2, 2).vllm_balancedness == 0.75
    assert [float(x) for x in eplb_jax.engine_metrics([0, 0], [0, 1], 2)] == [1, 0, 0, 0]
    assert eplb_jax.engine_metrics([3, 1], [0, 1], 1).tensorrt_llm_std == 0


def test_a_window():
    # GPU loads (10, 30), none, (20, 20): 2/3 and 1.
    load, phy2log = [[10, 10, 10, 10], [0, 0, 0, 0], [10, 10, 20, 0]], [[0, 0, 1, 2, 3, 3]] * 3
    topology = Topology(2, slots=(2, 4))
    got = window_metrics(load, phy2log, topology, age=jnp.int32(3))
    assert got == pytest.approx(
        {
            "eplb_balancedness_measured": (20 / 30 + 20 / 30) / 2,
            "eplb_worst_layer_imbalance": 0.5,
            "eplb_worst_layer": 0,
            "eplb_plan_age_windows": 3,
        },
        rel=1e-6,
    )
    # A GPU three times as fast takes three times the load.
    fast = window_metrics(load, phy2log, topology, speed=[1, 3])
    assert fast["eplb_balancedness_measured"] == pytest.approx(1)
    assert "eplb_plan_age_windows" not in fast
    worst = window_metrics([load, [[0] * 4, [0, 1, 1, 8], [0] * 4]], phy2log, topology)
    assert worst["eplb_worst_layer"] == 1
    assert worst["eplb_worst_layer_imbalance"] == pytest.approx(1)


def test_a_window_without_load():
    got = window_metrics(np.zeros((2, 4)), [[0, 1, 2, 3]] * 2, 2)
    assert list(got.values()) == [1, 0, -1]


def test_a_plan():
    old, new = [[0, 1, 2, 3]] * 2, [[0, 2, 1, 3], [0, 1, 2, 3]]
    moves = eplb_jax.moves(old, new, 2)
    windows = [[[4, 4, 1, 1]] * 2, [[0] * 4, [1, 3, 2, 2]]]
    got = plan_metrics(windows, new, 2, moves=moves, bytes_per_expert=44_040_192 * 50, seconds=0.25)
    assert got == pytest.approx(
        {
            "eplb_balancedness_predicted": (1 + 5 / 8 + 1) / 3,
            "eplb_plan_age_windows": 0,
            "eplb_plans": 1,
            "eplb_moves": 2,
            "eplb_moved_bytes": 2 * 44_040_192 * 50,
            "eplb_planning_seconds": 0.25,
        }
    )
    first = plan_metrics(windows, new, 2)
    assert first["eplb_moves"] == 0
    assert not {"eplb_moved_bytes", "eplb_planning_seconds"} & set(first)
    with pytest.raises(ValueError, match=r"seconds=-1\.0 must be finite and not negative"):
        plan_metrics(windows, new, 2, seconds=-1)


def samples(registry):
    """Values by name and labels, as a scraper reads them, and the types of names."""
    text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    values = {
        (x.name, *sorted(x.labels.items())): x.value
        for family in families
        for x in family.samples
        if not x.name.endswith("_created")
    }
    kinds = {x.name: x.type for x in families if not x.name.endswith("_created")}
    assert text.count("# TYPE") == len({x.name for x in families})
    return values, kinds, {x.name: x.documentation for x in families}


def test_windows_and_plans_of_a_service():
    registry = CollectorRegistry()
    exporter = Exporter(registry)
    history, moved, age = eplb_jax.init_history(4, 32), 0, 0
    plan = eplb_jax.placement_of(np.tile(np.arange(48) % 32, (4, 1)))
    for seed in range(3):
        load, age = lognormal(4, 32, seed=seed), age + 1
        history = eplb_jax.update_history(history, load)
        exporter.update(window_metrics(load, plan, TOPOLOGY, age=age))
        if seed < 2:
            old, plan, age = plan, eplb_jax.plan(history, TOPOLOGY, strategy="greedy"), 0
            moves = eplb_jax.moves(old, plan, TOPOLOGY)
            numbers = plan_metrics(
                history, plan, TOPOLOGY, moves=moves, bytes_per_expert=1000, seconds=0.5
            )
            exporter.update(numbers)
            moved += int(np.asarray(moves.received).sum())
    values, kinds, _ = samples(registry)
    measured = metrics.balance(load, plan, TOPOLOGY)
    seen = np.stack([lognormal(4, 32, seed=seed) for seed in range(2)])
    assert values == pytest.approx(
        {
            ("eplb_balancedness_measured",): float(measured.mean_balancedness),
            ("eplb_worst_layer_imbalance",): float(measured.imbalance.max()),
            ("eplb_worst_layer",): int(measured.imbalance.argmax()),
            ("eplb_plan_age_windows",): 1,
            ("eplb_balancedness_predicted",): float(
                metrics.balance(seen, plan, TOPOLOGY).mean_balancedness
            ),
            ("eplb_planning_seconds",): 0.5,
            ("eplb_plans_total",): 2,
            ("eplb_moves_total",): moved,
            ("eplb_moved_bytes_total",): 1000 * moved,
        }
    )
    assert moved > 0
    assert kinds == {name: kind for name, (kind, _) in METRICS.items()}


def test_help_has_the_definition_and_names_follow_the_conventions():
    registry = CollectorRegistry(auto_describe=True)
    Exporter(registry)
    _, _, documentation = samples(registry)
    for name, (kind, text) in METRICS.items():
        assert documentation[name] == text
        assert name.startswith("eplb_")
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert f"\n{name} " in monitoring.__doc__
        assert kind in ("gauge", "counter")


def test_labels_tell_phases_apart():
    registry = CollectorRegistry()
    exporter = Exporter(registry, labels=["model", "phase"])
    for phase, other in (("prefill", 100), ("decode", 300)):
        values = window_metrics([[100, other]], [[0, 1]], 2)
        exporter.update(values, model="v3", phase=phase)
    values, _, _ = samples(registry)
    found = {dict(x[1:])["phase"]: v for x, v in values.items() if x[0].endswith("_imbalance")}
    assert found == {"prefill": 0, "decode": 0.5}
    for labels in ({}, {"model": "v3"}, {"model": "v3", "phase": "decode", "rank": "0"}):
        with pytest.raises(ValueError, match="labels must be model, phase, got"):
            exporter.update({"eplb_plans": 1.0}, **labels)


def test_a_registry_is_never_half_filled():
    registry = CollectorRegistry()
    first = Exporter(registry)
    first.update({"eplb_plans": 1.0})
    before = generate_latest(registry)
    with pytest.raises(ValueError, match="use one exporter for all, with labels"):
        Exporter(registry, labels=["phase"])
    with pytest.raises(ValueError, match="eplb_move is not a metric; choose from: eplb_balanced"):
        first.update({"eplb_plans": 1.0, "eplb_move": 1.0})
    assert generate_latest(registry) == before

    registry = CollectorRegistry()
    Gauge("eplb_moves", "of somebody else", registry=registry)
    before = generate_latest(registry)
    with pytest.raises(ValueError, match="eplb_moves"):
        Exporter(registry)
    assert generate_latest(registry) == before


@pytest.mark.parametrize("labels", [{}, {"phase": "decode"}])
def test_what_is_not_known_has_no_value(labels):
    registry = CollectorRegistry()
    exporter = Exporter(registry, labels=list(labels))
    exporter.update(plan_metrics([[1, 1]], [[0, 1]], 2), **labels)
    values, _, _ = samples(registry)
    known = {key[0] for key, value in values.items() if not np.isnan(value)}
    gauges = {name for name in known if not name.endswith("_total")}
    assert gauges == {"eplb_balancedness_predicted", "eplb_plan_age_windows"}


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"pip install 'eplb-jax\[metrics\]'"):
        Exporter(CollectorRegistry())
