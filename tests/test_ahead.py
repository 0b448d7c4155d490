"""Plans compiled ahead of time."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lognormal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eplb_jax

COUNTS = 20, 4, 2, 4


@pytest.mark.parametrize(
    ("policy", "strategy"), [("global", "auto"), ("global", "greedy"), ("hierarchical", "greedy")]
)
def test_the_plan_of_rebalance_experts(policy, strategy):
    load = (lognormal(5, 16) * 1000).astype(np.int64)
    plan = eplb_jax.compile(load.shape, *COUNTS, policy=policy, strategy=strategy)
    direct = eplb_jax.rebalance_experts(load, *COUNTS, policy=policy, strategy=strategy)
    for values in (load, load.astype(np.float32), load.tolist(), jnp.asarray(load, jnp.float32)):
        chex.assert_trees_all_equal(plan(values), direct)


def test_windows_and_the_plan_in_place():
    windows = np.stack([lognormal(5, 16, seed=i) for i in range(4)])
    old = eplb_jax.rebalance_experts(lognormal(5, 16, seed=9), *COUNTS)
    for limits in ({}, {"max_moves": 2, "price": 0.01}):
        limits |= {"strategy": "greedy"}
        plan = eplb_jax.compile(windows.shape, *COUNTS, previous=True, **limits)
        direct = eplb_jax.rebalance_experts(windows, *COUNTS, previous=old, **limits)
        chex.assert_trees_all_equal(plan(windows, old), direct)
        chex.assert_trees_all_equal(plan(windows, np.asarray(old.phy2log)), direct)


def test_calls_compile_nothing(caplog):
    plan = eplb_jax.compile((3, 16), *COUNTS, strategy="greedy")
    plan(lognormal(3, 16))
    with jax.log_compiles(), warnings.catch_warnings(record=True), caplog.at_level("WARNING"):
        plan(lognormal(3, 16, seed=1))
        plan((lognormal(3, 16, seed=2) * 100).astype(np.int64))
        assert "ompil" not in caplog.text
        jax.jit(lambda x: x + 3)(1)
        assert "ompil" in caplog.text  # so a compilation would have been seen


def test_layers_over_a_mesh():
    mesh = Mesh(jax.devices()[:2], ("layers",))
    over_layers = NamedSharding(mesh, PartitionSpec("layers"))
    load = lognormal(4, 16)
    plan = eplb_jax.compile(load.shape, *COUNTS, strategy="greedy", sharding=over_layers)
    text = plan.executable.as_text()
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", text)
    direct = eplb_jax.rebalance_experts(load, *COUNTS, strategy="greedy")
    chex.assert_trees_all_equal(plan(load), direct)


def test_errors():
    plan = eplb_jax.compile((3, 16), *COUNTS, strategy="greedy")
    with pytest.raises(ValueError, match=r"compiled for, \(3, 16\), got \(2, 16\)"):
        plan(lognormal(2, 16))
    with pytest.raises(TypeError, match="takes no previous; compile with previous=True"):
        plan(lognormal(3, 16), plan(lognormal(3, 16)))
    with pytest.raises(ValueError, match="layer 1, expert 2 is nan"):
        plan(np.where(np.arange(48).reshape(3, 16) == 18, np.nan, 1))
    with pytest.raises(ValueError, match=r"\(L, E\) or \(T, L, E\), got \(16,\)"):
        eplb_jax.compile((16,), *COUNTS)
    with pytest.raises(ValueError, match="max_moves needs previous"):
        eplb_jax.compile((3, 16), *COUNTS, max_moves=3)
    limited = eplb_jax.compile((3, 16), *COUNTS, strategy="greedy", previous=True)
    with pytest.raises(TypeError, match="needs previous"):
        limited(lognormal(3, 16))
    with pytest.raises(ValueError, match="previous"):
        limited(lognormal(3, 16), np.zeros((3, 20), np.int32))
