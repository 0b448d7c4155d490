"""With 64-bit types enabled the same is computed in the same 32 bits."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, metrics, runtime
from tests.helpers import QUICK, lognormal

L, E, R = 2, 16, 24
TOPOLOGY = Topology(8, slots=3, num_nodes=2)
LOAD = lognormal(L, E)
IDS = np.random.default_rng(0).integers(0, E, (64, 4)).astype(np.int32)


def plan(load=LOAD, strategy="greedy", **options):
    return eplb_jax.plan(load, TOPOLOGY, policy="global", strategy=strategy, **options)


@cache
def old():
    return plan(LOAD[::-1])


@cache
def new():
    return plan()


def mesh():
    return jax.make_mesh((8,), ("expert",))


def slots():
    return jnp.asarray(np.take_along_axis(LOAD, np.asarray(old().phy2log), axis=1))


def route(choice, **options):
    return runtime.to_physical(IDS, new().layer(0), choice, **options)


CALLS = {
    "windows": lambda: plan(np.stack([LOAD, LOAD[::-1]]), QUICK),
    "previous": lambda: plan(previous=old()),
    "max_moves": lambda: plan(previous=old(), max_moves=3),
    "gap": lambda: metrics.gap(LOAD, new(), TOPOLOGY),
    "moves": lambda: eplb_jax.moves(old(), new(), TOPOLOGY),
    "counts": lambda: runtime.expert_counts_from_slots(IDS, new().phy2log[0], E),
    "history": lambda: eplb_jax.update_history(eplb_jax.init_history(L, E), jnp.asarray(LOAD)),
    "round_robin": lambda: route("round_robin"),
    "random": lambda: route("random", key=jax.random.key(1)),
    "nearest": lambda: runtime.nearest_replica(new(), TOPOLOGY),
    "split_load": lambda: runtime.split_load(LOAD, new(), TOPOLOGY),
    "shares": lambda: route("shares", shares=jnp.ones(R, jnp.float32)),
    "to_slots": lambda: runtime.to_slots(jnp.asarray(LOAD), new(), mesh()),
    "relocate": lambda: runtime.relocate(slots(), old(), new(), mesh()),
    "to_logical": lambda: runtime.to_logical(slots(), old(), mesh()),
    "sum_replicas": lambda: runtime.sum_replicas(slots(), old(), mesh()),
    "mask_replicas": lambda: runtime.mask_replicas(slots(), old()),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_same(name):
    old(), new()
    expected = CALLS[name]()
    with jax.enable_x64(True):
        got = CALLS[name]()
    chex.assert_trees_all_equal_dtypes(got, expected)
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-3)
