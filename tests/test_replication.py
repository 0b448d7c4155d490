import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from tests import oracle
from tests.helpers import assert_same, lognormal


@pytest.mark.parametrize("spares", [0, 1, 5, 24, 60])
@pytest.mark.parametrize("kind", ["lognormal", "ties", "one hot", "some zero"])
def test_as_one_spare_at_a_time(kind, spares):
    rng = np.random.default_rng(spares)
    weight = {
        "lognormal": lognormal(6, 24, sigma=1.5),
        "ties": rng.integers(1, 5, (6, 24)),
        "one hot": np.eye(24)[[0, 7, 23]] * 100,
        "some zero": rng.integers(0, 3, (6, 24)) + np.eye(24)[:6],
    }[kind]
    assert_same(
        eplb_jax.replicate_experts(weight, 24 + spares),
        oracle.replicate_experts(weight, 24 + spares),
    )


def test_measured_load_as_one_spare_at_a_time():
    load = eplb_jax.loads.example()[0, ::8]
    assert_same(eplb_jax.replicate_experts(load, 320), oracle.replicate_experts(load, 320))


def test_without_load_the_spares_go_to_distinct_experts():
    _, rank, logcnt = eplb_jax.replicate_experts(np.zeros((2, 8)), 13)
    assert logcnt.tolist() == [[2, 2, 2, 2, 2, 1, 1, 1]] * 2
    assert np.max(rank) == 1


def test_no_counts_have_a_lower_maximum_load_of_a_replica():
    weight = lognormal(20, 4)
    logcnt = np.asarray(eplb_jax.replicate_experts(weight, 9).logcnt)
    ours = (weight / logcnt).max(axis=1)
    counts = np.array([c for c in np.ndindex(6, 6, 6, 6) if sum(c) == 5]) + 1
    best = (weight[:, None] / counts).max(axis=2).min(axis=1)
    np.testing.assert_allclose(ours, best, rtol=1e-6)


def test_under_jit_and_vmap():
    weight = jnp.asarray(lognormal(4, 8))
    eager = eplb_jax.replicate_experts(weight, 12)
    assert_same(jax.jit(lambda w: eplb_jax.replicate_experts(w, 12))(weight), eager)
    stacked = jax.vmap(lambda w: eplb_jax.replicate_experts(w, 12))(weight.reshape(2, 2, 8))
    assert_same([x.reshape(4, -1) for x in stacked], eager)
