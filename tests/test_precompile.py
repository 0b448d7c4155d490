"""Plans that are compiled ahead of time."""

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eplb_jax
from eplb_jax import Topology
from tests.helpers import QUICK, lognormal

TOPOLOGY = Topology(4, slots=5, num_nodes=2, num_groups=4)
SHAPE = 3, 16
GREEDY = {"strategy": "greedy"}


@pytest.fixture(scope="module")
def fresh():
    return eplb_jax.precompile(SHAPE, TOPOLOGY, **GREEDY)


@pytest.fixture(scope="module")
def held():
    """Plans of four windows, from the one in place."""
    return eplb_jax.precompile((4, *SHAPE), TOPOLOGY, with_previous=True, **GREEDY)


@pytest.mark.parametrize(("policy", "strategy"), [("global", "fast"), ("hierarchical", "greedy")])
def test_the_plan_of_a_direct_call(policy, strategy):
    load = (lognormal(5, 16) * 1000).astype(np.int64)
    plan = eplb_jax.precompile(load.shape, TOPOLOGY, policy=policy, strategy=strategy)
    direct = eplb_jax.plan(load, TOPOLOGY, policy=policy, strategy=strategy)
    for values in (load, load.astype(np.float32), load.tolist(), jnp.asarray(load, jnp.float32)):
        chex.assert_trees_all_equal(plan(values), direct)


def test_windows_and_the_plan_in_place(held):
    windows = np.stack([lognormal(*SHAPE, seed=i) for i in range(4)])
    old = eplb_jax.plan(lognormal(*SHAPE, seed=9), TOPOLOGY, strategy=QUICK)
    assert not np.array_equal(old.log2phy, eplb_jax.placement_of(old.phy2log).log2phy)
    for limits in ({}, {"max_moves": 0, "move_penalty": 0.01}):
        limits |= GREEDY
        plan = held
        if "max_moves" in limits:
            plan = eplb_jax.precompile(windows.shape, TOPOLOGY, with_previous=True, **limits)
        for previous in (old, np.asarray(old.phy2log)):
            direct = eplb_jax.plan(windows, TOPOLOGY, previous=previous, **limits)
            chex.assert_trees_all_equal(plan(windows, previous), direct)
        if "max_moves" in limits:
            np.testing.assert_array_equal(direct.phy2log, old.phy2log)
            # Layers that stay keep the order of their replicas.
            np.testing.assert_array_equal(plan(windows, old).log2phy, old.log2phy)


@pytest.mark.parametrize(
    "way", [{"cost": eplb_jax.Cost(1, 5, tokens_per_step=64)}, {"split": "flexible"}]
)
def test_plans_for_a_cost_and_for_a_split(way):
    load, options = lognormal(*SHAPE), GREEDY | way
    old = eplb_jax.placement_of(np.resize(np.arange(16), (3, 20)))
    plan = eplb_jax.precompile(load.shape, TOPOLOGY, with_previous=True, **options)
    direct = eplb_jax.plan(load, TOPOLOGY, previous=old, **options)
    chex.assert_trees_all_equal(plan(load, old), direct)
    if "split" in way:
        assert eplb_jax.moves(old, plan(load, old, max_moves=1), TOPOLOGY).received.sum() <= 3
    with pytest.raises(ValueError, match="is no limit of these plans"):
        plan(load, old, move_penalty=0.1)
    with pytest.raises(ValueError, match="takes no"):
        eplb_jax.precompile(load.shape, TOPOLOGY, with_previous=True, move_penalty=0.1, **options)


def test_calls_compile_nothing(fresh, held, caplog):
    fresh(lognormal(3, 16))
    windows, old = np.stack([lognormal(3, 16)] * 4), np.resize(np.arange(16), (3, 20))
    with jax.log_compiles(), warnings.catch_warnings(record=True), caplog.at_level("WARNING"):
        fresh(lognormal(3, 16, seed=1))
        fresh((lognormal(3, 16, seed=2) * 100).astype(np.int64))
        held(windows, old)
        assert "ompil" not in caplog.text
        jax.jit(lambda x: x + 3)(1)
        assert "ompil" in caplog.text  # so a compilation would have been seen


def test_layers_over_a_mesh():
    mesh = Mesh(jax.devices()[:2], ("layers",))
    over_layers = NamedSharding(mesh, PartitionSpec("layers"))
    load = lognormal(4, 16)
    plan = eplb_jax.precompile(load.shape, TOPOLOGY, sharding=over_layers, **GREEDY)
    text = plan.executable.as_text()
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", text)
    direct = eplb_jax.plan(load, TOPOLOGY, **GREEDY)
    chex.assert_trees_all_equal(plan(load), direct)
    later, stay = lognormal(4, 16, seed=1), GREEDY | {"with_previous": True}
    plan = eplb_jax.precompile(load.shape, TOPOLOGY, sharding=over_layers, **stay)
    expected = eplb_jax.plan(later, TOPOLOGY, previous=direct, **GREEDY)
    for old in (direct, jax.device_put(direct, over_layers)):
        chex.assert_trees_all_equal(plan(later, old), expected)


def test_errors(fresh, held):
    with pytest.raises(ValueError, match=r"compiled for, \(3, 16\), got \(2, 16\)"):
        fresh(lognormal(2, 16))
    with pytest.raises(TypeError, match="takes no previous; precompile with with_previous=True"):
        fresh(lognormal(3, 16), fresh(lognormal(3, 16)))
    with pytest.raises(ValueError, match="layer 1, expert 2 is nan"):
        fresh(np.where(np.arange(48).reshape(3, 16) == 18, np.nan, 1))
    with pytest.raises(ValueError, match=r"\(L, E\) or \(T, L, E\), got \(16,\)"):
        eplb_jax.precompile((16,), TOPOLOGY)
    with pytest.raises(ValueError, match="max_moves needs previous"):
        eplb_jax.precompile((3, 16), TOPOLOGY, max_moves=3)
    windows = np.stack([lognormal(3, 16)] * 4)
    with pytest.raises(TypeError, match="needs previous"):
        held(windows)
    with pytest.raises(ValueError, match="previous"):
        held(windows, np.zeros((3, 20), np.int32))
