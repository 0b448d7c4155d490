"""What weighs how much in a plan for the next window."""

import jax
import jax.numpy as jnp
import numpy as np

import eplb_jax
from eplb_jax import Topology, plan
from eplb_jax.planning.forecast import history_of, weigh
from tests.helpers import QUICK, assert_same
from tests.test_history import remember, trace_of

TOPOLOGY = Topology(4, slots=4)


def weights_of(trace):
    """The weights of groups, recent windows and prediction; the mean over layers, at most 1."""
    _, weight, _ = jax.jit(lambda x: weigh(history_of(x)))(jnp.asarray(trace, jnp.float32))
    weight = np.asarray(weight / jnp.max(weight, axis=0, keepdims=True)).mean(axis=1)
    return np.split(weight, [len(weight) - 1 - min(len(trace), 8), len(weight) - 1])


def test_a_window_weighs_what_it_says():
    rng = np.random.default_rng(3)
    share = rng.dirichlet(np.ones(64), 4)
    sizes = [100_000, 1_000] * 4
    same = np.stack([rng.multinomial(n, share) for n in sizes])
    _, recent, _ = weights_of(same)
    np.testing.assert_allclose(recent[::2] / recent.max(), 1, atol=0.05)
    assert np.all(recent[1::2] < 0.05)  # their noise says nothing new
    apart = np.stack([rng.multinomial(n, rng.dirichlet(np.ones(64), 4)) for n in sizes])
    _, recent, _ = weights_of(apart)
    assert np.all(recent > 0.8)  # each is a traffic of its own
    empty = same.copy()
    empty[5] = 0
    without = np.delete(empty, 5, axis=0)
    assert_same(*(jax.tree.leaves(remember(x.astype(np.float32))) for x in (empty, without)))


def test_the_prediction_weighs_by_its_lead_over_the_mean():
    stationary, drift = (
        eplb_jax.traces.generate(kind, 16, 16, 64, tokens=65536, seed=2, **options)
        for kind, options in (("stationary", {}), ("drift", {"change": 0.2}))
    )
    shuffled = drift[np.random.default_rng(0).permutation(16)]
    ahead = [weights_of(x)[2][0] for x in (stationary, drift, shuffled)]
    assert ahead[0] < 0.02
    assert ahead[1] == 1
    assert ahead[2] < 0.15


def test_memory_weighs_by_how_near_it_was_to_later_windows():
    rng = np.random.default_rng(4)
    kinds = rng.dirichlet(np.ones(64), (2, 8))
    turns = np.stack([rng.multinomial(9000, kinds[t // 10 % 2]) for t in range(44)])
    remembered, recent, _ = weights_of(turns)
    assert remembered.sum() > recent.sum()
    drift = eplb_jax.traces.generate("drift", 40, 8, 64, tokens=65536, change=0.2, seed=2)
    remembered, recent, _ = weights_of(drift)
    assert remembered.sum() < 0.02 * recent.sum()


def test_weights_of_the_caller():
    trace = trace_of(6)
    equal = plan(trace, TOPOLOGY, weights="equal", strategy=QUICK)
    scaled = trace * np.array([1, 1000, 0.25, 7, 1, 30], np.float32)[:, None, None]
    assert_same(equal, plan(scaled, TOPOLOGY, weights=np.ones(6), strategy=QUICK))
    only = plan(trace, TOPOLOGY, weights=[0, 0, 0, 1, 0, 0], strategy=QUICK)
    alone = [
        eplb_jax.metrics.balance(trace[3], x, TOPOLOGY).mean_imbalance
        for x in (only, plan(trace[3], TOPOLOGY, strategy=QUICK), equal)
    ]
    assert alone[0] < alone[1] + 0.05 < alone[2]
