"""Plans for the next window, made from several past ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, check_placement, plan, replay
from eplb_jax.evaluation.metrics import balance
from eplb_jax.packing.items import items_of
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio
from tests.helpers import COLLECTIVES, QUICK, assert_same, duplicates, lognormal

KEY = jax.random.key(0)
NODES = Topology(8, slots=6, num_nodes=2, num_groups=4)


def windows(count, layers=3, experts=32, sigma=0.5, seed=0):
    """A load that changes from window to window."""
    rng = np.random.default_rng(seed)
    change = rng.lognormal(sigma=sigma, size=(count, layers, experts))
    return (lognormal(layers, experts) * change).astype(np.float32)


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
