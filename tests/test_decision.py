"""Whether to put a plan in place."""

import numpy as np
import pytest

from eplb_jax import Topology, decide, moves, plan
from tests.helpers import QUICK

TOPOLOGY = Topology(4, slots=6)
MODEL = {"bytes_per_expert": 10**6, "bandwidth": 1e9, "seconds_per_token": 1e-6}


def plans(windows=6, layers=3, noise=0.05, shift=1.0, seed=0):
    """A plan for loads that have changed since, one for those, and later windows of them."""
    rng = np.random.default_rng(seed)
    before = rng.lognormal(size=(layers, 16)) * 1000
    now = before * rng.lognormal(sigma=shift, size=before.shape)
    trace = now * rng.lognormal(sigma=noise, size=(2 * windows, layers, 16))
    old = plan(before, TOPOLOGY, strategy=QUICK)
    new = plan(trace[:windows], TOPOLOGY, strategy=QUICK)
    return trace[windows:], old, new


def max_load(load, plan):
    """Tokens of the most loaded GPU of every layer."""
    share = load / np.asarray(plan.logcnt)
    slots = np.take_along_axis(share, np.asarray(plan.phy2log), axis=1)
    return slots.reshape(len(load), 4, -1).sum(axis=2).max(axis=1)


def test_gain_cost_and_order_by_hand():
    trace, old, new = plans()
    answer = decide(trace, old, new, TOPOLOGY, serves=100, **MODEL)
    saved = np.array([max_load(x, old) - max_load(x, new) for x in trace]) * 1e-6
    np.testing.assert_allclose(answer.layer_gain, saved.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(answer.gain, saved.sum(axis=1).mean(), rtol=1e-4)
    error = saved.sum(axis=1).std(ddof=1) / np.sqrt(len(trace))
    np.testing.assert_allclose(answer.error, error, rtol=1e-3)
    copies = moves(old, new, TOPOLOGY)
    received = np.asarray(copies.received)
    busiest = np.maximum(received, np.asarray(copies.sent)).max(axis=1).sum()
    np.testing.assert_allclose(answer.cost, busiest * 1e-3)
    np.testing.assert_array_equal(answer.layer_bytes, received.sum(axis=1) * 10**6)
    np.testing.assert_allclose(answer.payback, answer.cost / answer.gain)
    rate = answer.layer_gain / answer.layer_bytes
    assert np.all(np.diff(rate[answer.order]) <= 0)
    assert sorted(answer.order) == [0, 1, 2]


def test_a_plan_is_applied_if_it_serves_for_long_and_kept_if_not():
    trace, old, new = plans()
    assert decide(trace, old, new, TOPOLOGY, serves=1e6, **MODEL).action == "apply"
    once = decide(trace, old, new, TOPOLOGY, serves=1e-3, **MODEL)
    assert once.action == "keep"
    assert decide(trace, new, old, TOPOLOGY, serves=1e6, **MODEL).action == "keep"


def test_hysteresis_and_doubt_both_hold_back():
    trace, old, new = plans()
    first = decide(trace, old, new, TOPOLOGY, serves=1, **MODEL)
    serves = first.payback * 1.2  # the gain exceeds the cost by a fifth
    options = {"serves": serves, "confidence": 0.0, **MODEL}
    assert decide(trace, old, new, TOPOLOGY, margin=0.0, **options).action == "apply"
    assert decide(trace, old, new, TOPOLOGY, margin=0.5, **options).action == "keep"
    wild = trace * np.linspace(0.01, 3, len(trace))[:, None, None]
    serves = decide(wild, old, new, TOPOLOGY, serves=1, **MODEL).payback * 1.6
    assert decide(wild, old, new, TOPOLOGY, serves=serves, **MODEL).action == "undecided"
    assert (
        decide(wild, old, new, TOPOLOGY, serves=serves, **MODEL | {"confidence": 0.0}).action
        == "apply"
    )


def test_one_window_decides_nothing():
    trace, old, new = plans()
    answer = decide(trace[0], old, new, TOPOLOGY, serves=1e6, **MODEL)
    assert answer.action == "undecided"
    assert answer.error == np.inf


def test_the_same_plan_costs_nothing_and_is_kept():
    trace, old, _ = plans()
    answer = decide(trace, old, old, TOPOLOGY, serves=10, **MODEL)
    assert (answer.action, answer.gain, answer.cost, answer.payback) == ("keep", 0, 0, 0)
    assert not answer.layer_bytes.any()


def test_the_time_of_a_token_follows_from_measured_seconds():
    trace, old, new = plans()
    seconds = [max_load(x, old).sum() * 3e-6 for x in trace]
    model = {k: v for k, v in MODEL.items() if k != "seconds_per_token"}
    measured = decide(trace, old, new, TOPOLOGY, serves=9, measured_seconds=seconds, **model)
    given = decide(trace, old, new, TOPOLOGY, serves=9, seconds_per_token=3e-6, **model)
    np.testing.assert_allclose(measured.gain, given.gain, rtol=1e-4)


def test_bytes_do_not_wrap():
    trace, old, new = plans()
    big = decide(trace, old, new, TOPOLOGY, serves=9, **MODEL | {"bytes_per_expert": 10**9})
    assert big.layer_bytes.min() >= 10**9
    traffic = moves(old, new, TOPOLOGY).traffic(10**9)
    np.testing.assert_array_equal(traffic.received.sum(axis=1), big.layer_bytes)
    assert traffic.copies.sum() == 3 * 24 * 10**9


def test_one_layer_and_foreign_maps():
    trace, *both = plans()
    answer = decide(trace, *both, TOPOLOGY, serves=100, **MODEL)
    maps = both[0].phy2log.tolist(), np.asarray(both[1].phy2log)
    assert_equal(decide(trace, *maps, TOPOLOGY, serves=100, **MODEL), answer)
    options = {"topology": TOPOLOGY, "serves": 100, **MODEL}
    layer = decide(trace[0, 1], *(x.layer(1) for x in both), **options)
    assert_equal(layer, decide(trace[0, 1:2], *(x.phy2log[1:2] for x in both), **options))


def assert_equal(one, other):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"serves": 0}, "serves=0 must be more than 0"),
        ({"bandwidth": -1}, "bandwidth=-1.0 must be finite and not negative"),
        ({"seconds_per_token": None}, "seconds_per_token and measured_seconds, got neither"),
        ({"measured_seconds": [1] * 6}, "seconds_per_token and measured_seconds, got both"),
        ({"seconds_per_token": None, "measured_seconds": [1]}, r"shape \(6,\), got \(1,\)"),
        ({"bytes_per_expert": 0}, "bytes_per_expert=0 is less than 1"),
    ],
)
def test_bad_numbers_are_named(changed, message):
    trace, old, new = plans()
    with pytest.raises(ValueError, match=message):
        decide(trace, old, new, TOPOLOGY, **{"serves": 1, **MODEL, **changed})
