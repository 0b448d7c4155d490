"""Replays against loops over windows, layers and slots."""

import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

import eplb_jax
from eplb_jax.evaluation.replay import all_windows, in_order, last_window, replay, without_balancer

T, L, E, R, G = 7, 2, 6, 8, 4
SIZES = R, 1, 1, G


@pytest.fixture
def trace():
    trace = np.random.default_rng(0).integers(0, 1000, (T, L, E))
    trace[4, 1] = 0
    return trace


def placement(phy2log):
    logcnt = np.stack([np.bincount(x, minlength=E) for x in phy2log])
    return eplb_jax.Placement(np.asarray(phy2log, np.int32), np.zeros((L, E, R - E + 1)), logcnt)


class Drawn:
    """A plan function that draws plans, another one for every state of affairs; it notes them."""

    def __init__(self):
        self.calls = []

    def __call__(self, past, placed):
        rng = np.random.default_rng(int(past.sum()))
        slots = [rng.permutation([*range(E), *rng.integers(0, E, R - E)]) for _ in range(L)]
        self.calls.append((past, placed, placement(np.stack(slots))))
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
    plan, seen = Drawn(), []
    result = replay(
        trace, plan, num_gpus=G, window=3, every=every, on_window=lambda: seen.append(1)
    )
    planned = range(3, T, every)
    plans = [plan(trace[t - 3 : t], None)[0] for t in planned]
    for i, t in enumerate(range(3, T)):
        for layer in range(L):
            gpu_load, imbalance = measured(trace[t, layer], plans[i // every][layer])
            np.testing.assert_allclose(result.gpu_load[i, layer], gpu_load, rtol=1e-12)
            np.testing.assert_allclose(result.imbalance[i, layer], imbalance, atol=1e-12)
    moves = [eplb_jax.moves(x, y, G).received.sum(axis=1) for x, y in pairwise(plans)]
    np.testing.assert_array_equal(result.moves, np.reshape(moves, (len(planned) - 1, L)))
    assert result.seconds.shape == (len(planned),)
    assert len(seen) == T - 3


def test_plans_see_the_past_and_the_plan_in_place(trace):
    plan = Drawn()
    replay(trace, plan, num_gpus=G, window=3, every=2)
    calls = plan.calls
    # The first two are made twice.
    assert len(calls) == 2 + 2
    for (past, _, _), t in zip(calls, (3, 3, 5, 5), strict=True):
        np.testing.assert_array_equal(past, trace[t - 3 : t])
    assert calls[0][1] is calls[1][1] is None
    assert calls[2][1] is calls[3][1] is calls[1][2]


def test_compilation_is_timed_apart(trace):
    seen = set()

    def plan(past, placed):
        if (placed is None) not in seen:
            seen.add(placed is None)
            time.sleep(0.2)
        return Drawn()(past, placed)

    result = replay(trace, plan, num_gpus=G, window=2)
    assert 0.3 < result.compile_seconds < 2
    assert np.median(result.seconds) < 0.1


@pytest.mark.parametrize("keep", [True, False])
def test_all_windows_is_rebalance_experts(trace, keep):
    plan = all_windows(*SIZES, strategy="greedy", keep=keep)
    first = plan(trace[:3], None)
    second = plan(trace[1:4], first)
    rebalance = partial(eplb_jax.rebalance_experts, strategy="greedy")
    np.testing.assert_array_equal(first.phy2log, rebalance(trace[:3], *SIZES).phy2log)
    expected = rebalance(trace[1:4], *SIZES, previous=first if keep else None)
    np.testing.assert_array_equal(second.phy2log, expected.phy2log)


def test_moves_are_limited(trace):
    plan = all_windows(*SIZES, strategy="greedy", max_moves=1)
    assert replay(trace, plan, num_gpus=G, window=3).moves.max() == 1
    dear = all_windows(*SIZES, strategy="greedy", price=10.0)
    assert replay(trace, dear, num_gpus=G, window=3).moves.max() == 0


def test_last_window_is_deepseeks(trace):
    plan = last_window(*SIZES)(trace[:3], None)
    expected = eplb_jax.rebalance_experts(trace[2], *SIZES, strategy="greedy")
    np.testing.assert_array_equal(plan.phy2log, expected.phy2log)


def test_without_balancer(trace):
    result = without_balancer(trace, num_gpus=G, window=3)
    assert result.moves.shape == (0, L)
    assert result.seconds.shape == (0,)
    for i, t in enumerate(range(3, T)):
        # Six experts in order on four GPUs: 0 1, 2, 3 4, 5.
        a, b, c, d, e, f = trace[t, 0].astype(float)
        gpu_load = np.array([a + b, c, d + e, f])
        np.testing.assert_allclose(result.gpu_load[i, 0], gpu_load / gpu_load.mean())
        np.testing.assert_allclose(
            result.imbalance[i, 0], gpu_load.max() / gpu_load.mean() - 1, atol=1e-12
        )
    assert result.imbalance[1, 1] == 0
    np.testing.assert_array_equal(result.gpu_load[1, 1], np.ones(G))


def test_in_order():
    assert in_order(np.asarray([[4, 0, 2, 2]]), 2).tolist() == [[4, 4]]
    assert in_order(np.ones((1, 5)), 2).tolist() == [[3, 2]]
    assert in_order(np.ones((1, 2)), 3).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4), {}, r"trace must have the shape \[windows, layers, experts\], got \(3, 4\)"),
        ((8, 3, 4), {}, "window=8 leaves none of the 8 windows to measure; nearest: 7"),
        ((1, 3, 4), {"window": 1}, "trace has 1 window; planning from the past needs at least 2"),
        ((9, 3, 4), {"window": 0}, "window=0 is less than 1; nearest: 1"),
        ((9, 3, 4), {"every": 0}, "every=0 is less than 1; nearest: 1"),
        ((9, L, E), {"num_gpus": 3}, "num_gpus=3 does not divide number of slots=8; nearest: 2, 4"),
    ],
)
def test_errors(shape, options, message):
    with pytest.raises(ValueError, match=message):
        replay(np.ones(shape), Drawn(), **{"num_gpus": 2} | options)


def test_errors_of_loads_and_plans():
    trace = np.ones((4, 2, 3))
    trace[2, 1, 0] = -1
    with pytest.raises(ValueError, match=r"trace at window 2, layer 1, expert 0 is -1.0"):
        without_balancer(trace, num_gpus=2, window=1)
    with pytest.raises(ValueError, match="max_moves=2 needs keep"):
        all_windows(*SIZES, keep=False, max_moves=2)
