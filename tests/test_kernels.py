"""The kernels for GPUs, interpreted and as lowered: the packings of the plain forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same, lognormal

import eplb_jax
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.kernels import GreedyInKernel, InKernel, in_kernels
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio

KEY = jax.random.key(0)
LANES = 2


def instance(m, c, windows, labelled):
    """Random packings as lanes, with loads and labels of their own."""
    n = m * c
    rng = np.random.default_rng(n)
    weight = rng.lognormal(size=(windows, n, LANES))
    weight = jnp.asarray(weight / weight.max(axis=1, keepdims=True), jnp.float32)
    contents = rng.permuted(np.tile(np.arange(n)[:, None], LANES), axis=0)
    runs = np.stack([np.repeat(np.arange(n), rng.integers(1, m + 1, n))[:n] for _ in range(LANES)])
    label = jnp.asarray(runs.T, jnp.int32) if labelled else None
    return jnp.asarray(contents.reshape(m, c, LANES), jnp.int32), weight, KEY, label


@pytest.mark.parametrize(
    ("m", "c", "windows", "labelled", "two"),
    [
        (4, 5, 1, False, True),
        (5, 4, 1, True, True),
        (8, 3, 3, False, True),
        (6, 9, 2, True, False),
        (6, 9, 1, True, True),
        (3, 1, 1, False, True),
        (1, 4, 1, False, True),
    ],
)
def test_exchanges_as_in_the_plain_form(m, c, windows, labelled, two):
    given = instance(m, c, windows, labelled)
    pairs, peak = Pairs(5, two), Peak(6)
    once = jax.jit(pairs)(*given)
    plain = jax.jit(peak)(once, *given[1:])
    np.testing.assert_array_equal(jax.jit(InKernel(pairs, peak, interpret=True))(*given), plain)


@pytest.mark.parametrize(("m", "c"), [(5, 4), (8, 9)])
def test_greedy_as_in_the_plain_form(m, c):
    contents, weight, *_ = instance(m, c, 1, False)
    order = contents.reshape(m * c, LANES)
    for given in ((weight[0], order), (weight[0, :, 0], order), (weight[0, :, 0], order[:, 0])):
        assert_same(GreedyInKernel(interpret=True)(*given, m), quantised_greedy(*given, m))


@pytest.mark.parametrize(("slots", "gpus", "windows"), [(36, 6, 1), (32, 8, 1), (36, 6, 2)])
def test_plans_by_kernels(slots, gpus, windows):
    plain = dataclasses.replace(
        eplb_jax.STRATEGIES["fast"], refinement=Portfolio(columns=8, rounds=2, peaks=2)
    )
    kernels = in_kernels(plain, interpret=True)
    assert isinstance(kernels.construction.greedy, GreedyInKernel)
    load = np.stack([lognormal(3, 24, seed=i) for i in range(windows)]).squeeze()
    plan = eplb_jax.rebalance_experts(load, slots, 1, 1, gpus, strategy=kernels)
    assert_same(plan, eplb_jax.rebalance_experts(load, slots, 1, 1, gpus, strategy=plain))


def test_not_every_strategy_has_kernels():
    with pytest.raises(ValueError, match=r"'lns' has no form in kernels; choose one of: auto"):
        in_kernels("lns")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("m", "c", "windows"), [(5, 4, 1), (32, 9, 1), (6, 9, 4)])
def test_one_launch_on_a_gpu(m, c, windows, labelled):
    refine = jax.jit(InKernel(Pairs(4), Peak(4)))
    traced = refine.trace(*instance(m, c, windows, labelled))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton") == 1


def test_greedy_is_one_launch_on_a_gpu():
    contents, weight, *_ = instance(5, 4, 1, False)
    traced = jax.jit(GreedyInKernel(), static_argnums=2).trace(
        weight[0], contents.reshape(20, LANES), 5
    )
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton") == 1


def test_elsewhere_it_must_be_interpreted():
    with pytest.raises(ValueError, match="interpret mode"):
        InKernel(Pairs(4), Peak(4))(*instance(5, 4, 1, False))
