"""The model of benchmarks/: outputs and training are those without a plan."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eplb_jax
from eplb_jax import runtime

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import train_moe
from model import Choice, Model, contiguous, forward, initial, replicas_equal

SLOTS = 40
SMALL = Model(layers=2, width=16, heads=2, hidden=16, context=16)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(jax.devices()[:8], ("expert",))


def random_plan(seed, shape=(2, 32)):
    load = np.random.default_rng(seed).lognormal(sigma=1.5, size=shape)
    return eplb_jax.plan(load, eplb_jax.Topology(8, SLOTS // 8), strategy="greedy")


@pytest.fixture(scope="module")
def expected(mesh):
    tokens = np.random.default_rng(0).integers(0, 256, (8, 16))
    params, plan = initial(SMALL), contiguous(SMALL)
    params["experts"] = runtime.to_slots(params["experts"], plan, mesh)
    call = jax.jit(partial(forward, model=SMALL, mesh=mesh))
    return tokens, call(params, tokens, plan, jax.random.key(1))


@pytest.mark.parametrize("choice", get_args(Choice))
def test_outputs_do_not_depend_on_the_plan(choice, mesh, expected):
    tokens, (logits, routed) = expected
    model = Model(**{**vars(SMALL), "choice": choice})
    traced = []

    @jax.jit
    def call(*args):
        traced.append("call")
        return forward(*args, model=model, mesh=mesh)

    @jax.jit
    def move(*args):
        traced.append("move")
        return runtime.relocate(*args, mesh)

    params = initial(model)
    plan = jax.device_put(random_plan(99), NamedSharding(mesh, PartitionSpec()))
    params["experts"] = runtime.to_slots(params["experts"], plan, mesh)
    for seed in range(5):
        params["experts"], plan = move(params["experts"], plan, random_plan(seed))
        got, by = call(params, tokens, plan, jax.random.key(seed))
        np.testing.assert_allclose(got, logits, atol=1e-5)
        np.testing.assert_array_equal(by.load, routed.load)
        assert int(by.gpu_load.sum()) == 2 * tokens.size * model.layers
    assert traced == ["move", "call"]


def test_training_is_that_without_plans(mesh, monkeypatch):
    # A strategy that compiles fast.
    quick = partial(eplb_jax.plan, strategy="greedy")
    monkeypatch.setattr(train_moe.eplb_jax, "plan", quick)
    run = train_moe.train(SMALL, mesh, random_plan(0), steps=5, every=2)
    other = train_moe.train(SMALL, mesh, contiguous(SMALL), steps=5)
    assert len(run.plans) == 3
    assert all((x.phy2log != y.phy2log).any() for x, y in pairwise(run.plans))
    np.testing.assert_allclose(run.losses, other.losses, atol=1e-5)
    np.testing.assert_array_equal(run.load, other.load)
    experts = [x["experts"] for x in run.state[:3]]
    assert replicas_equal(experts, run.state.plan)
    weights = (
        runtime.to_logical(x.state.params["experts"], x.state.plan, mesh) for x in (run, other)
    )
    chex.assert_trees_all_close(*weights, atol=1e-5)
    assert len(run.seconds["compilation"]) == 3  # step, plan and move, once each
    twice = jnp.argmax(jnp.take_along_axis(run.state.plan.logcnt, run.state.plan.phy2log, 1), 1)
    other_slot = jax.tree.map(lambda x: x.at[0, twice[0]].add(1), experts)
    assert not replicas_equal(other_slot, run.state.plan)
