"""The time of replicas, fits of it to measured seconds, and what follows for a move."""

import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Cost, Topology, decide, fit_cost, metrics
from eplb_jax.planning.cost import curve_of, time_loads, time_of_replica
from tests.helpers import QUICK, assert_within, noisy

TOPOLOGY = Topology(4, slots=6)
LAYERS, EXPERTS = 3, 20
MOVE = {"bytes_per_expert": 10**6, "bandwidth": 1e9, "serves": 1e4}


@pytest.fixture(scope="module")
def plans():
    """A plan for loads that have changed since, and one for those."""
    load = windows(8)
    old = eplb_jax.plan(load[0, :, ::-1], TOPOLOGY, strategy=QUICK)
    return old, eplb_jax.plan(load, TOPOLOGY, strategy=QUICK)


def windows(count, seed=0, tokens=20000, total=0.0):
    """Tokens of windows whose imbalance differs, and whose sizes differ by `total`."""
    base = np.random.default_rng(0).lognormal(0, 0.7, (LAYERS, EXPERTS))
    rng = np.random.default_rng(seed)
    load = base * rng.lognormal(0, 0.4, (count, LAYERS, EXPERTS))
    load *= rng.lognormal(0, total, (count, 1, 1)) / load.sum(axis=-1, keepdims=True)
    return np.round(load * tokens)


def gpu_tokens(load, plan):
    """Tokens of every GPU, [T, L, G], in float64."""
    share = load / np.asarray(plan.logcnt)
    slots = np.take_along_axis(share, np.asarray(plan.phy2log)[None], axis=2)
    return slots.reshape(*load.shape[:2], 4, -1).sum(axis=3)


@pytest.mark.parametrize("tile", [1, 8, 32])
def test_expected_time_is_the_mean_over_poisson_counts(tile):
    cost = Cost(2.0, 30.0, tile=tile, tokens_per_step=100)
    mean = np.array([0, 0.01, 0.3, 1, 3, 7.7, 20, 90, 700, 1500], np.float32)
    counts = np.random.default_rng(0).poisson(mean, (100_000, len(mean)))
    times = 2.0 * np.ceil(counts / tile) * tile + 30.0 * (counts > 0)
    error = times.std(axis=0) / len(times) ** 0.5
    got = np.asarray(time_of_replica(curve_of(cost), jnp.asarray(mean)))
    assert np.all(np.abs(got - times.mean(axis=0)) <= 5 * error + 2e-3 * times.mean(axis=0))


def test_windows_that_are_steps_are_rounded_exactly():
    load, count = jnp.array([[0, 0.5, 9, 16, 33]]), jnp.array([[1, 1, 1, 2, 2]])
    got = time_loads(load, count, curve_of(Cost(0.5, 10, tile=8)))
    np.testing.assert_allclose(got, [[0, 9, 18, 2 * 14, 2 * 22]])


def test_loads_of_many_steps_are_those_of_steps_times_their_number():
    step = jnp.array([[1.0, 3, 12, 0]])
    count = jnp.array([[1, 2, 3, 1]])
    cost = Cost(1, 5, tile=4, tokens_per_step=16)
    once = np.asarray(time_loads(step, count, curve_of(cost)))
    np.testing.assert_allclose(time_loads(1000 * step, count, curve_of(cost)), 1000 * once, 1e-5)
    each = np.asarray(time_of_replica(curve_of(cost), step / count.astype(jnp.float32)))
    np.testing.assert_allclose(once, np.asarray(count) * each, rtol=1e-5)


def test_gpu_loads_and_balance_by_a_cost(plans):
    load, cost = windows(2), Cost(1e-6, 1e-3, tile=128)
    per_slot = np.take_along_axis(
        load / np.asarray(plans[0].logcnt), np.asarray(plans[0].phy2log)[None], axis=2
    )
    times = 1e-6 * np.ceil(per_slot / 128) * 128 + 1e-3 * np.minimum(per_slot, 1)
    times = times.reshape(2, LAYERS, 4, -1).sum(axis=3)
    got = metrics.balance(load, plans[0], TOPOLOGY, cost=cost)
    np.testing.assert_allclose(got.gpu_load, times, rtol=1e-5)
    np.testing.assert_allclose(got.balancedness, times.mean(2) / times.max(2), rtol=1e-5)
    plain = metrics.gpu_loads(load, plans[0], TOPOLOGY)
    tokens = metrics.gpu_loads(load, plans[0], TOPOLOGY, cost=Cost())
    np.testing.assert_allclose(plain, tokens, rtol=1e-6)


@pytest.mark.parametrize("total", [0.0, 0.3])
def test_a_fit_recovers_the_time_of_tokens(plans, total):
    load = windows(60, total=total)
    seconds = noisy(4e-2 + 1e-6 * gpu_tokens(load, plans[0]).max(axis=2).sum(axis=1))
    fit = fit_cost(load, plans[0], TOPOLOGY, seconds)
    assert (fit.follows, fit.knee) == (True, None)
    assert fit.evidence > 5
    assert 0.002 < fit.residual < 0.01
    assert fit.cost == Cost(fit.value.per_token)
    assert_within(fit, per_token=1e-6, fixed=4e-2)
    later = windows(5, seed=1, total=total)
    true = 4e-2 + 1e-6 * gpu_tokens(later, plans[1]).max(axis=2).sum(axis=1)
    got, error = fit.predict(later, plans[1], TOPOLOGY)
    assert np.all(np.abs(got - true) < 4 * error)
    assert np.all(error < 0.1 * true)


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_fit_tells_tokens_from_active_experts_of_gpus(plans, by_layer):
    load = windows(30, tokens=3000)
    cost = Cost(2e-6, 2e-5, tokens_per_step=40)
    times = np.asarray(metrics.gpu_loads(load, plans[0], TOPOLOGY, cost=cost), np.float64)
    times += 1e-4 / LAYERS * load.sum(axis=-1, keepdims=True) / 40
    times = noisy(times if by_layer else times.sum(axis=1), outliers=0)
    fit = fit_cost(load, plans[0], TOPOLOGY, times, tokens_per_step=40)
    assert fit.follows
    assert_within(fit, per_token=2e-6, per_active_expert=2e-5, fixed=1e-4)
    assert fit.cost.tokens_per_step == 40
    slowest = np.asarray(metrics.gpu_loads(load, plans[0], TOPOLOGY, cost=cost)).max(axis=2)
    steps = load.sum(axis=(1, 2)) / LAYERS / 40
    fit = fit_cost(load, plans[0], TOPOLOGY, slowest.sum(axis=1) + 1e-4 * steps, tokens_per_step=40)
    np.testing.assert_allclose(fit.value[2:4], (2e-6, 2e-5), rtol=0.02)


def test_time_that_goes_with_all_tokens_is_not_that_of_the_slowest_gpu(plans):
    load = windows(60, total=0.3)
    seconds = noisy(1e-3 + 1e-6 * load.sum(axis=(1, 2)) / 4)
    fit = fit_cost(load, plans[0], TOPOLOGY, seconds)
    assert fit.follows is False
    assert fit.cost is None
    np.testing.assert_allclose(fit.value.shared, 1e-6, rtol=0.05)


def test_a_knee_is_found_and_noise_has_none(plans):
    load = windows(60)
    tokens = gpu_tokens(load, plans[0]).max(axis=2)
    knee = np.median(tokens)
    seconds = noisy(1e-3 + 1e-6 * np.maximum(tokens, knee).sum(axis=1), 0.002)
    fit = fit_cost(load, plans[0], TOPOLOGY, seconds)
    assert_within(fit, per_token=1e-6, knee=knee)
    for seed in range(5):
        seconds = noisy(1e-3 + 1e-6 * tokens.sum(axis=1), seed=seed)
        assert fit_cost(load, plans[0], TOPOLOGY, seconds).knee is None


def test_flat_times_do_not_follow_the_load(plans):
    load = windows(24)
    for seed in range(3):
        fit = fit_cost(load, plans[0], TOPOLOGY, noisy(np.full(24, 5.0), seed=seed))
        assert fit.follows is False
        assert (fit.cost, fit.value.per_token) == (None, 0)
        np.testing.assert_allclose(fit.value.fixed, 5, rtol=0.01)
        saved, error = fit.saving(load, *plans, TOPOLOGY)
        assert not saved.any()
        assert 0 < error < 1


def test_what_does_not_vary_has_an_infinite_error(plans):
    load = np.repeat(windows(1), 12, axis=0)
    scaled = load * np.linspace(1, 2, 12)[:, None, None]
    for same, shown in (load, "fixed"), (scaled, "shared"):
        true = 1e-6 * gpu_tokens(same, plans[0]).max(axis=2).sum(axis=1)
        seconds = noisy(true)
        fit = fit_cost(same, plans[0], TOPOLOGY, seconds)
        assert (fit.follows, fit.cost) == (None, None)
        assert fit.error.per_token == fit.error.per_active_expert == np.inf
        assert np.isfinite(getattr(fit.error, shown))
        got, error = fit.predict(same, plans[0], TOPOLOGY)
        np.testing.assert_allclose(got, true, rtol=0.02)
        assert np.all(error < 0.02 * got)
        assert np.all(np.isinf(fit.predict(same, plans[1], TOPOLOGY)[1]))
        answer = decide(same, *plans, TOPOLOGY, measured_seconds=seconds, **MOVE)
        assert (answer.action, answer.error) == ("undecided", np.inf)
    few = fit_cost(windows(2), plans[0], TOPOLOGY, [1, 2])
    assert np.all(np.isinf(few.error))
    assert few.follows is None


def test_decide_keeps_where_time_does_not_follow_and_applies_where_it_does(plans):
    load = windows(24)
    flat = decide(load, *plans, TOPOLOGY, measured_seconds=noisy(np.full(24, 5.0)), **MOVE)
    assert (flat.action, flat.gain) == ("keep", 0)
    before, after = (gpu_tokens(load, x).max(axis=2) for x in plans)
    follows = noisy(1e-5 * before.sum(axis=1))
    answer = decide(load, *plans, TOPOLOGY, measured_seconds=follows, **MOVE)
    assert answer.action == "apply"
    true = 1e-5 * (before - after).sum(axis=1).mean()
    assert abs(answer.gain - true) < 3 * answer.error
    assert answer.error < 0.3 * true
    fit = fit_cost(load, plans[0], TOPOLOGY, follows)
    again = decide(load, *plans, TOPOLOGY, cost=fit, **MOVE)
    assert (again.gain, again.error) == (answer.gain, answer.error)
    flexible = decide(
        load, *plans, TOPOLOGY, measured_seconds=noisy(np.full(24, 5.0)), split="flexible", **MOVE
    )
    assert flexible.action == "keep"


def test_decide_keeps_where_both_plans_are_below_the_knee(plans):
    load = windows(40)
    tokens = gpu_tokens(load, plans[0]).max(axis=2)
    knee = 1.02 * np.median(tokens)
    seconds = noisy(1e-5 * np.maximum(tokens, knee).sum(axis=1), 1e-3, outliers=0)
    fit = fit_cost(load, plans[0], TOPOLOGY, seconds)
    assert fit.knee == pytest.approx(knee, rel=0.02)
    later = 0.5 * load
    answer = decide(later, *plans, TOPOLOGY, cost=fit, **MOVE)
    assert (answer.action, answer.gain) == ("keep", 0)


def test_decide_by_a_given_cost(plans):
    load, cost = windows(6), Cost(1e-6, 1e-3, tile=128)
    answer = decide(load, *plans, TOPOLOGY, cost=cost, **MOVE)
    times = [np.asarray(metrics.gpu_loads(load, x, TOPOLOGY, cost=cost)).max(axis=2) for x in plans]
    np.testing.assert_allclose(answer.layer_gain, (times[0] - times[1]).mean(axis=0), rtol=1e-4)
    tokens = decide(load, *plans, TOPOLOGY, cost=Cost(1e-6), **MOVE)
    plain = decide(load, *plans, TOPOLOGY, seconds_per_token=1e-6, **MOVE)
    np.testing.assert_allclose(tokens.gain, plain.gain, rtol=1e-4)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: Cost(0, 0), ValueError, "nearest: per_token=1"),
        (lambda: Cost(-1), ValueError, "per_token=-1.0 must be finite"),
        (lambda: Cost(tile=0), ValueError, "tile=0 is less than 1; nearest: 1"),
        (lambda: Cost(tokens_per_step=0.5), ValueError, "tokens_per_step=0.5 must be at least 1"),
        (lambda: balance(cost=1e-6), TypeError, "cost must be an eplb_jax.Cost, got 1e-06"),
        (lambda: balance(cost=Cost(), split="flexible"), ValueError, "got a split, too"),
        (lambda: fit([1, 2]), ValueError, r"seconds must have the shape \(3,\), got \(2,\)"),
        (lambda: fit([1, 2, -3]), ValueError, "seconds must be finite and not negative, got -3"),
        (lambda: fit("abc"), TypeError, "seconds must be an array of numbers, got 'abc'"),
        (lambda: fit([1] * 3, tile=2, split="flexible"), ValueError, "nearest with split: 1"),
        (lambda: fit([1] * 3, tile=1.5), TypeError, "tile must be an integer, got 1.5"),
        (lambda: fit([1] * 3, 0, tokens_per_step=8), ValueError, "load has no tokens"),
        (lambda: judge(), ValueError, "measured_seconds must have the shape"),
        (lambda: judge(cost=Cost()), ValueError, "got both"),
    ],
)
def test_bad_input_is_named(function, error, message):
    with pytest.raises(error, match=message):
        function()


def balance(**options):
    return metrics.balance([[1, 2, 3, 4]], [[0, 1, 2, 3]], 2, **options)


def fit(seconds, scale=1, **options):
    load = scale * np.arange(1, 13).reshape(3, 1, 4)
    return fit_cost(load, [[0, 1, 2, 3]], 2, seconds, **options)


def judge(**options):
    load = np.ones((3, 1, 4))
    maps = [[0, 1, 2, 3]], [[0, 2, 1, 3]]
    return decide(load, *maps, 2, measured_seconds=[1], **MOVE, **options)
