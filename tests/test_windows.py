"""Plans for the next window, made from several past ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, check_placement, plan, replay
from eplb_jax.arrays import sanitise
from eplb_jax.evaluation.metrics import balance
from eplb_jax.packing.items import items_of
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio
from eplb_jax.planning.forecast import MOST_WINDOWS, forecast, merge_windows
from tests.helpers import COLLECTIVES, QUICK, assert_same, duplicates, lognormal

KEY = jax.random.key(0)
NODES = Topology(8, slots=6, num_nodes=2, num_groups=4)


def windows(count, layers=3, experts=32, sigma=0.5, seed=0):
    """A load that changes from window to window."""
    rng = np.random.default_rng(seed)
    change = rng.lognormal(sigma=sigma, size=(count, layers, experts))
    return (lognormal(layers, experts) * change).astype(np.float32)


def forecast_of(trace):
    return forecast(sanitise(jnp.moveaxis(jnp.asarray(trace), 0, 1)))


def by_hand(trace):
    """The forecast in float64: prediction, its weight, and the weighted mean."""
    share = trace / trace.sum(axis=2, keepdims=True)
    states, errors = [], []
    for gain in (0, 1, 0.7, 0.5, 0.3, 0.15):
        state, missed = share[0], np.zeros(share.shape[1])
        for t in range(1, len(share)):
            missed += np.abs(share[t] - state).sum(axis=1) * (t > 1)
            state = state + (gain or 1 / (t + 1)) * (share[t] - state)
        states.append(state)
        errors.append(missed)
    best = np.argmin(errors, axis=0)
    predicted = np.array(states)[best, np.arange(share.shape[1])]
    trust = np.minimum(4 * ((errors[0] / np.min(errors, axis=0)) ** 2 - 1), 8)[:, None]
    return predicted, trust, (share.mean(axis=0) + trust * predicted) / (1 + trust)


@pytest.mark.parametrize("kind", ["stationary", "drift", "topics"])
def test_the_forecast_is_that_of_float64(kind):
    trace = eplb_jax.traces.generate(kind, 8, 6, 32, seed=3)
    result = forecast_of(trace.astype(np.float32))
    predicted, trust, middle = by_hand(trace)
    np.testing.assert_allclose(result.load, middle, rtol=0.01, atol=1e-5)
    share = np.moveaxis(trace / trace.sum(axis=2, keepdims=True), 0, 1)
    np.testing.assert_allclose(result.windows[:, :-1], share, atol=1e-6)
    # Weights are multiples of 1 / 16 of that of the windows.
    weight = np.square(np.asarray(result.windows[:, -1]) / predicted) / 8
    np.testing.assert_allclose(weight, np.broadcast_to(trust, weight.shape), rtol=0.02, atol=0.08)
    assert (np.median(trust) < 0.2) == (kind == "stationary")


def test_windows_of_zeros_count_for_nothing_and_units_mean_nothing():
    trace = windows(4)
    scale = np.array([1, 1000, 0.25, 7], np.float32)[:, None, None]
    with_zeros = np.zeros((7, *trace.shape[1:]), np.float32)
    with_zeros[[1, 2, 4, 6]] = trace
    plain = forecast_of(trace)
    for other, kept in ((trace * scale, [0, 1, 2, 3, 4]), (with_zeros, [1, 2, 4, 6, 7])):
        result = forecast_of(other)
        np.testing.assert_allclose(result.load, plain.load, atol=1e-6)
        np.testing.assert_allclose(result.above, plain.above, atol=1e-6)
        np.testing.assert_allclose(result.windows[:, kept], plain.windows, atol=1e-5)
    assert not np.any(result.windows[:, [0, 3, 5]])


def test_one_window_is_the_load_itself_and_none_is_idle():
    trace, quick = windows(1), {"strategy": QUICK}
    assert_same(plan(trace, NODES, **quick), plan(trace[0], NODES, **quick))
    idle = np.zeros((2, 3, 32))
    assert_same(plan(idle, NODES, **quick), plan(idle[0], NODES, **quick))
    idle[1] = trace[0]
    both = plan(idle, NODES, **quick)
    alone = balance(trace[0], plan(trace[0], NODES, **quick), NODES)
    assert balance(trace[0], both, NODES).mean_imbalance < alone.mean_imbalance + 0.03


@pytest.mark.parametrize(
    ("strategy", "policy"),
    [("auto", "hierarchical"), ("best", "global"), ("restarts", "hierarchical")],
)
def test_plans_of_windows_are_plans(strategy, policy):
    result = plan(windows(3), NODES, policy=policy, strategy=strategy)
    check_placement(result)
    assert not duplicates(result.phy2log, 8).any()
    if policy == "hierarchical":
        node = np.asarray(result.phy2log).reshape(3, 2, 24) // 8
        assert all(len(np.unique(x)) == 2 for x in node.reshape(6, 24))


def test_layers_over_a_mesh_need_no_communication():
    trace = windows(3, layers=8)
    make = jax.jit(lambda x: plan(x, Topology(8, slots=6), strategy=QUICK))
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(trace, jax.sharding.NamedSharding(mesh, jax.P(None, "layers")))
    compiled = make.lower(spread).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    assert_same(compiled(spread), make(trace))


def test_long_histories_are_merged():
    trace = windows(37, layers=2, experts=12)
    merged = merge_windows(trace)
    assert len(merged) == MOST_WINDOWS
    np.testing.assert_allclose(merged.sum(axis=0), trace.sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(merged[0], trace[:2].sum(axis=0))
    np.testing.assert_array_equal(merge_windows(jnp.asarray(trace)), merged)
    assert len(merge_windows(trace[:16])) == 16
    layers = np.ones((20, 12), np.float32)
    assert merge_windows(layers) is layers  # layers, not windows
    topology = Topology(4, slots=4)
    assert_same(*(plan(x, topology, strategy=QUICK) for x in (trace, merged)))


def several(m, c, count=3, seed=0):
    """The loads of items in several windows, the items, and a packing of them."""
    rng = np.random.default_rng(seed)
    load = np.sort(rng.lognormal(size=m * c))[::-1] * rng.lognormal(sigma=0.7, size=(count, m * c))
    load = jnp.asarray(load, jnp.float32)
    contents = jnp.asarray(rng.permutation(m * c).reshape(m, c), jnp.int32)
    return load, items_of(jnp.sum(load, axis=0), m, windows=load), contents


def squares(load, contents):
    return np.square(np.asarray(load, float)[:, np.asarray(contents)].sum(axis=2)).sum()


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_round_over_windows_makes_the_best_exchange_of_a_pair(two, seed):
    load, items, contents = several(2, 4, seed=seed)
    after = jax.jit(Pairs(1, two=two))(contents, items, KEY)
    a, b = (set(x) for x in np.asarray(contents).tolist())
    sizes = (1, 2) if two else (1,)
    options = [
        [sorted(a - set(x) | set(y)), sorted(b - set(y) | set(x))]
        for k in sizes
        for x in itertools.combinations(a, k)
        for y in itertools.combinations(b, k)
    ]
    least = min(squares(load, np.array(x)) for x in [*options, contents])
    np.testing.assert_allclose(squares(load, after), least, rtol=1e-3)


@pytest.mark.parametrize("refinement", [Pairs(9, two=False), Portfolio(4, 2, 4)], ids=str)
@pytest.mark.parametrize(("m", "c"), [(2, 9), (5, 4)])
def test_squares_over_windows_do_not_grow(refinement, m, c):
    load, items, contents = several(m, c)
    after = np.asarray(jax.jit(refinement)(contents, items, KEY))
    np.testing.assert_array_equal(np.sort(after, axis=None), np.arange(m * c))
    if isinstance(refinement, Pairs):
        assert squares(load, after) < squares(load, contents)
    peaks = [np.asarray(load)[:, np.asarray(x)].sum(2).max(1).sum() for x in (contents, after)]
    assert peaks[1] < peaks[0]


def test_the_most_loaded_packs_of_windows_are_lowered_in_turn():
    load, items, contents = several(4, 5)
    after = np.asarray(jax.jit(Peak(12))(contents, items, KEY))
    sums = [np.asarray(load)[:, np.asarray(x)].sum(axis=2) for x in (contents, after)]
    assert sums[1].max(axis=1).sum() < sums[0].max(axis=1).sum()


@pytest.mark.quality
def test_plans_of_windows_hold_better_on_the_next_than_those_of_the_last():
    trace, topology = eplb_jax.loads.example("gpt_oss_20b")[:16, ::4], Topology(8, slots=5)
    planners = {
        "last": eplb_jax.plan_from_last_window(topology),
        "windows": eplb_jax.plan_from_windows(topology, keep=False, strategy="fast"),
    }
    mean = {k: replay(trace, x, topology).imbalance.mean() for k, x in planners.items()}
    assert mean["windows"] < 0.75 * mean["last"]
