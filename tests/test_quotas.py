"""Shares of loads as whole tokens, and where these come from."""

import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, runtime
from tests.helpers import QUICK, lognormal


@pytest.mark.parametrize("windows", [None, 2])
def test_quotas_are_shares_in_whole_tokens(windows):
    rng = np.random.default_rng(0)
    plan = eplb_jax.plan(lognormal(3, 16), Topology(4, slots=6), strategy=QUICK)
    leading = (3,) if windows is None else (windows, 3)
    load = rng.integers(0, 1000, (*leading, 16))
    load[..., :2] = 0, 1
    shares = rng.dirichlet(np.ones(3), (*leading, 24))[..., 0].astype(np.float32)
    shares[..., 0, :] *= rng.random(24) < 0.5
    tokens, first = map(np.asarray, runtime.quotas(load, plan, jnp.asarray(shares)))
    for place in np.ndindex(*leading):
        phy2log = np.asarray(plan.phy2log[place[-1]])
        for expert in range(16):
            slots, count = np.flatnonzero(phy2log == expert), load[(*place, expert)]
            start, size = first[place][slots], tokens[place][slots]
            parts = [np.arange(x, x + n) for x, n in zip(start, size, strict=True)]
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))
            share = shares[place][slots]
            if share.sum():
                assert np.all(np.abs(size - count * share / share.sum()) <= 1.001)
    with pytest.raises(TypeError, match="whole tokens, got dtype float32"):
        runtime.quotas(jnp.asarray(load, jnp.float32), plan, jnp.asarray(shares))
    with pytest.raises(ValueError, match="the plan is for"):
        runtime.quotas(load, plan, jnp.asarray(shares[..., 1:]))


def test_local_quotas_keep_tokens_on_their_gpu_and_node():
    """Sums are those of `quotas`, and as many tokens of an expert stay as can."""
    rng = np.random.default_rng(0)
    topology = Topology(4, slots=6, num_nodes=2)
    plan = eplb_jax.plan(lognormal(3, 16), topology, strategy=QUICK, policy="global")
    phy2log = np.asarray(plan.phy2log).copy()
    phy2log[0, 1] = phy2log[0, 0]  # twice on a GPU
    phy2log[0, 2:] = np.r_[np.arange(16), np.arange(6)]
    plan = eplb_jax.placement_of(phy2log)
    sent = rng.integers(0, 100, (2, 3, 4, 16)) * (rng.random((2, 3, 4, 16)) < 0.8)
    shares = jnp.asarray(rng.random((2, 3, 24)) * (rng.random((2, 3, 24)) < 0.8), jnp.float32)
    whole = runtime.quotas(sent.sum(axis=2), plan, shares).tokens
    tokens, first = map(np.asarray, runtime.local_quotas(sent, plan, shares, topology))
    np.testing.assert_array_equal(tokens.sum(axis=2), whole)
    gpu = np.arange(24) // 6
    for t, layer, expert in np.ndindex(2, 3, 16):
        slots = np.flatnonzero(phy2log[layer] == expert)
        mine, quota = tokens[t, layer][:, slots], np.asarray(whole)[t, layer, slots]
        supply = sent[t, layer, :, expert]
        for source in range(4):
            spans = zip(first[t, layer, source, slots], mine[source], strict=True)
            parts = np.concatenate([np.arange(x, x + n) for x, n in spans])
            np.testing.assert_array_equal(np.sort(parts), np.arange(supply[source]))
        room = np.array([quota[gpu[slots] == g].sum() for g in range(4)])
        kept = np.array([mine[g, gpu[slots] == g].sum() for g in range(4)])
        np.testing.assert_array_equal(kept, np.minimum(supply, room))
        left, space = (x.reshape(2, 2).sum(axis=1) for x in (supply - kept, room - kept))
        near = np.array([mine[g][gpu[slots] // 2 == g // 2].sum() for g in range(4)])
        near = (near - kept).reshape(2, 2).sum(axis=1)
        np.testing.assert_array_equal(near, np.minimum(left, space))
    with pytest.raises(ValueError, match="sent must have 4 GPUs"):
        runtime.local_quotas(sent[:, :, :3], plan, shares, topology)
