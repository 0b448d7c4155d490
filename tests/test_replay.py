"""Replays against loops over windows, layers and slots."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, plan_from_last_window, plan_from_windows, replay
from eplb_jax.evaluation.metrics import gpu_loads_in_order
from eplb_jax.evaluation.replay import without_balancer

T, L, E, R, G = 7, 2, 6, 8, 4
TOPOLOGY = Topology(G, slots=R // G)


@pytest.fixture
def trace():
    trace = np.random.default_rng(0).integers(0, 1000, (T, L, E))
    trace[4, 1] = 0
    return trace


class RandomPlanner:
    """A planner whose plans depend on the past alone; it lists its calls and results."""

    def __init__(self):
        self.calls = []

    def __call__(self, past, placed):
        rng = np.random.default_rng(int(past.sum()))
        slots = [rng.permutation([*range(E), *rng.integers(0, E, R - E)]) for _ in range(L)]
        self.calls.append((past, placed, eplb_jax.placement_of(np.stack(slots))))
        return self.calls[-1][2]


def measured(load, phy2log):
    """GPU loads relative to the mean, and imbalance, of one layer."""
    gpu_load = [0.0] * G
    for slot, expert in enumerate(phy2log):
        gpu_load[slot // (R // G)] += load[expert] / list(phy2log).count(expert)
    mean = sum(gpu_load) / G
    if mean == 0:
        return [1.0] * G, 0.0
    return [x / mean for x in gpu_load], max(gpu_load) / mean - 1


@pytest.mark.parametrize("every", [1, 2, 9])
def test_loads_imbalance_and_moves(trace, every):
    plan, measured_windows = RandomPlanner(), []
    count = partial(measured_windows.append, 1)
    result = replay(trace, plan, TOPOLOGY, window=3, every=every, on_window=count)
    planned = range(3, T, every)
    plans = [plan(trace[t - 3 : t], None)[0] for t in planned]
    for i, t in enumerate(range(3, T)):
        for layer in range(L):
            gpu_load, imbalance = measured(trace[t, layer], plans[i // every][layer])
            np.testing.assert_allclose(result.gpu_load[i, layer], gpu_load, rtol=1e-6)
            np.testing.assert_allclose(result.imbalance[i, layer], imbalance, atol=1e-6)
    moves = [eplb_jax.moves(x, y, TOPOLOGY).received.sum(axis=1) for x, y in pairwise(plans)]
    np.testing.assert_array_equal(result.moves, np.reshape(moves, (len(planned) - 1, L)))
    assert result.seconds.shape == (len(planned),)
    assert len(measured_windows) == T - 3


def test_plans_see_the_past_and_the_plan_in_place(trace):
    plan = RandomPlanner()
    replay(trace, plan, TOPOLOGY, window=3, every=2)
    calls = plan.calls
    # The first two are made twice.
    assert len(calls) == 2 + 2
    for (past, _, _), t in zip(calls, (3, 3, 5, 5), strict=True):
        np.testing.assert_array_equal(past, trace[t - 3 : t])
    assert calls[0][1] is calls[1][1] is None
    assert calls[2][1] is calls[3][1] is calls[1][2]


def test_a_plan_in_place_at_first_is_seen_and_left_by_moves(trace):
    plan, start = RandomPlanner(), RandomPlanner()(trace[:1], None)
    result = replay(trace, plan, TOPOLOGY, window=5, previous=start)
    assert plan.calls[0][1] is start
    moves = eplb_jax.moves(start, plan.calls[0][2], TOPOLOGY).received.sum(axis=1)
    np.testing.assert_array_equal(result.moves[0], moves)
    assert len(result.moves) == len(result.seconds) == 2


@pytest.mark.parametrize("first", [0.2, 0.001])
def test_compilation_is_timed_apart_and_never_negative(trace, monkeypatch, first):
    """Each of the two kinds of call takes `first` seconds once, and 0.01 from then on."""
    now, known = [0.0], set()

    def plan(past, placed):
        now[0] += 0.01 if (placed is None) in known else first
        known.add(placed is None)
        return RandomPlanner()(past, placed)

    monkeypatch.setattr("eplb_jax.evaluation.replay.perf_counter", lambda: now[0])
    result = replay(trace, plan, TOPOLOGY, window=2)
    assert result.compile_seconds == pytest.approx(max(2 * (first - 0.01), 0))
    np.testing.assert_allclose(result.seconds, np.full(T - 2, 0.01))


@pytest.mark.parametrize("keep", [True, False])
def test_plans_from_windows_are_those_of_plan(trace, keep):
    planner = plan_from_windows(TOPOLOGY, strategy="greedy", keep=keep)
    first = planner(trace[:3], None)
    second = planner(trace[1:4], first)
    plan = partial(eplb_jax.plan, topology=TOPOLOGY, strategy="greedy")
    np.testing.assert_array_equal(first.phy2log, plan(trace[:3]).phy2log)
    expected = plan(trace[1:4], previous=first if keep else None)
    np.testing.assert_array_equal(second.phy2log, expected.phy2log)


def test_moves_are_limited(trace):
    limited = plan_from_windows(TOPOLOGY, strategy="greedy", max_moves=1)
    assert replay(trace, limited, TOPOLOGY, window=3).moves.max() == 1
    expensive = plan_from_windows(TOPOLOGY, strategy="greedy", move_penalty=10.0)
    assert replay(trace, expensive, TOPOLOGY, window=3).moves.max() == 0


def test_plans_from_the_last_window_are_deepseeks(trace):
    plan = plan_from_last_window(TOPOLOGY)(trace[:3], None)
    expected = eplb_jax.rebalance_experts(trace[2], R, 1, 1, G, strategy="greedy")
    np.testing.assert_array_equal(plan.phy2log, expected.phy2log)


def test_foreign_maps_are_plans(trace):
    planner, maps = RandomPlanner(), RandomPlanner()
    expected = replay(trace, planner, TOPOLOGY, window=3)
    result = replay(trace, lambda *x: maps(*x).phy2log.tolist(), TOPOLOGY, window=3)
    np.testing.assert_array_equal(result.imbalance, expected.imbalance)
    np.testing.assert_array_equal(result.moves, expected.moves)


def test_without_balancer(trace):
    result = without_balancer(trace, TOPOLOGY, window=3)
    assert result.moves.shape == (0, L)
    assert result.seconds.shape == (0,)
    for i, t in enumerate(range(3, T)):
        # Six experts in order on four GPUs: 0 1, 2, 3 4, 5.
        a, b, c, d, e, f = trace[t, 0].astype(float)
        gpu_load = np.array([a + b, c, d + e, f])
        np.testing.assert_allclose(result.gpu_load[i, 0], gpu_load / gpu_load.mean())
        np.testing.assert_allclose(
            result.imbalance[i, 0], gpu_load.max() / gpu_load.mean() - 1, atol=1e-6
        )
    assert result.imbalance[1, 1] == 0
    np.testing.assert_array_equal(result.gpu_load[1, 1], np.ones(G))


def test_gpu_loads_in_order():
    assert gpu_loads_in_order(np.asarray([[4, 0, 2, 2]]), 2).tolist() == [[4, 4]]
    assert gpu_loads_in_order(np.ones((1, 5)), 2).tolist() == [[3, 2]]
    assert gpu_loads_in_order(np.ones((1, 2)), 3).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4), {}, r"trace must have the shape \[windows, layers, experts\], got \(3, 4\)"),
        ((8, 3, 4), {}, "window=8 leaves nothing to measure in 8 windows; nearest: 7"),
        ((1, 3, 4), {"window": 1}, "trace has 1 window; planning from the past needs at least 2"),
        ((9, 3, 4), {"window": 0}, "window=0 is less than 1; nearest: 1"),
        ((9, 3, 4), {"every": 0}, "every=0 is less than 1; nearest: 1"),
        (
            (9, L, E),
            {"topology": Topology(2, slots=3)},
            "topology has 2 GPUs of 3 slots, 6 in total",
        ),
        ((9, L, E + 1), {}, r"load has the shape \(1, 2, 7\), but the plan is for \(2, 6\)"),
    ],
)
def test_errors(shape, options, message):
    with pytest.raises(ValueError, match=message):
        replay(np.ones(shape), RandomPlanner(), **{"topology": TOPOLOGY} | options)


def test_errors_of_loads_and_plans():
    trace = np.ones((4, 2, 3))
    trace[2, 1, 0] = -1
    with pytest.raises(ValueError, match=r"trace at window 2, layer 1, expert 0 is -1.0"):
        without_balancer(trace, Topology(2, slots=2), window=1)
    with pytest.raises(ValueError, match="max_moves=2 needs keep=True; nearest: max_moves=None"):
        plan_from_windows(TOPOLOGY, keep=False, max_moves=2)
