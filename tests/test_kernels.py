"""The kernels for GPUs, interpreted and as lowered: the packings of the plain forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import STRATEGIES, Topology, balanced_packing, in_kernels, plan
from eplb_jax.packing.constructions import quantised_greedy
from eplb_jax.packing.items import items_of
from eplb_jax.packing.kernels import GreedyInKernel, InKernel
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio
from tests.helpers import assert_same, lognormal

KEY = jax.random.key(0)
LANES = 2


def instance(m, c, windows=1, labelled=False):
    """Random packings as lanes, and items with loads and labels of their own in every lane."""
    n = m * c
    rng = np.random.default_rng(n)
    load = jnp.asarray(rng.lognormal(size=(windows, n, LANES)), jnp.float32)
    contents = rng.permuted(np.tile(np.arange(n)[:, None], LANES), axis=0)
    runs = np.stack([np.repeat(np.arange(n), rng.integers(1, m + 1, n))[:n] for _ in range(LANES)])
    label = jnp.asarray(runs.T, jnp.int32) if labelled else None
    items = items_of(load[0], m, label, load)
    return jnp.asarray(contents.reshape(m, c, LANES), jnp.int32), items, KEY


@pytest.mark.parametrize(
    ("m", "c", "windows", "labelled"), [(4, 5, 1, False), (8, 3, 3, True), (6, 9, 1, True)]
)
def test_exchanges_as_in_the_plain_form(m, c, windows, labelled):
    given = instance(m, c, windows, labelled)
    pairs, peak = Pairs(5), Peak(6)
    plain = jax.jit(lambda x, *rest: peak(pairs(x, *rest), *rest))(*given)
    np.testing.assert_array_equal(jax.jit(InKernel(pairs, peak, interpret=True))(*given), plain)


@pytest.mark.parametrize("lanes", [True, False])
def test_greedy_as_in_the_plain_form(lanes):
    m, c = 5, 4
    contents, items, _ = instance(m, c)
    given = items, contents.reshape(m * c, LANES)
    if not lanes:
        given = jax.tree.map(lambda x: x[..., 0], given)
    assert_same(GreedyInKernel(interpret=True)(*given, m), quantised_greedy(*given, m))


def test_strategies_by_kernels():
    plain = dataclasses.replace(
        STRATEGIES["fast"], refinement=Portfolio(columns=8, rounds=2, peaks=2)
    )
    kernels = in_kernels(plain, interpret=True)
    assert isinstance(kernels.construction.greedy, GreedyInKernel)
    weight, windows = lognormal(3, 24), lognormal(6, 24, seed=1).reshape(2, 3, 24)
    for run in (
        lambda strategy: balanced_packing(weight, 6, strategy=strategy),
        lambda strategy: plan(windows, Topology(6, slots=6), strategy=strategy),
    ):
        assert_same(run(kernels), run(plain))


def test_not_every_strategy_has_kernels():
    with pytest.raises(ValueError, match=r"has no form in kernels; choose one of: auto"):
        in_kernels("lns")


def launches(traced):
    """Triton kernels in the program for CUDA."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@__gpu$xla.gpu.triton")


@pytest.mark.parametrize(
    ("m", "c", "windows", "labelled"), [(5, 4, 1, True), (32, 9, 1, False), (6, 9, 4, True)]
)
def test_exchanges_are_one_launch_on_a_gpu(m, c, windows, labelled):
    refine = jax.jit(InKernel(Pairs(4), Peak(4)))
    assert launches(refine.trace(*instance(m, c, windows, labelled))) == 1


def test_greedy_is_one_launch_on_a_gpu():
    contents, items, _ = instance(5, 4)
    greedy = jax.jit(GreedyInKernel(), static_argnums=2)
    assert launches(greedy.trace(items, contents.reshape(20, LANES), 5)) == 1


def test_elsewhere_it_must_be_interpreted():
    with pytest.raises(ValueError, match="interpret mode"):
        InKernel(Pairs(4), Peak(4))(*instance(5, 4))
