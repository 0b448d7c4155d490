"""Gradients of replicas over eight devices: summed once, and the same in all of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import runtime
from tests.helpers import lognormal

L, E, R, G = 2, 16, 24, 8
TOPOLOGY = eplb_jax.Topology(G, R // G)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def plan():
    steep = lognormal(L, E, sigma=2.0)
    return eplb_jax.plan(steep, TOPOLOGY, strategy="greedy")


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
    return jax.make_mesh((8,), ("expert",), axis_types=(request.param,))


def summed(grads, plan):
    """One logical gradient per expert, in float64."""
    sums = np.zeros((L, E, *grads.shape[2:]))
    for layer, experts in enumerate(np.asarray(plan.phy2log)):
        np.add.at(sums[layer], experts, grads[layer].astype(np.float64))
    return sums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_slot_gets_the_sum_bit_for_bit(plan, mesh, dtype):
    assert plan.logcnt.max() >= 4
    given = np.asarray(jnp.asarray(RNG.normal(size=(L, R, 3, 5)), dtype))
    over = jax.NamedSharding(mesh, P(None, "expert"))
    grads = jax.device_put({"up": given, "bias": given[..., 0, 0]}, over)
    got = runtime.sum_replicas(grads, plan, mesh)
    sums, experts = summed(given, plan), np.asarray(plan.phy2log)
    for layer in range(L):
        for name, wanted in (("up", sums), ("bias", sums[..., 0, 0])):
            slots = np.asarray(got[name])[layer]
            assert slots.dtype == dtype
            tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
            close = np.abs(slots.astype(np.float64) - wanted[layer][experts[layer]])
            assert close.max() <= tolerance * np.abs(wanted).max()
            for expert in range(E):
                assert len({x.tobytes() for x in slots[experts[layer] == expert]}) == 1


def test_permutations_send_nothing(mesh):
    plan = eplb_jax.plan(lognormal(L, E), eplb_jax.Topology(G, E // G), strategy="greedy")
    grads = jnp.asarray(RNG.normal(size=(L, E, 3)), jnp.float32)
    np.testing.assert_array_equal(runtime.sum_replicas(grads, plan, mesh), grads)
    np.testing.assert_array_equal(runtime.mask_replicas(grads, plan), grads)


def test_only_experts_with_replicas_are_sent(plan, mesh):
    grads = jax.ShapeDtypeStruct((L, R, 16), jnp.float32)
    text = jax.jit(partial(runtime.sum_replicas, mesh=mesh)).lower(grads, plan).compile().as_text()
    kinds = re.findall(r" (all-[\w-]+|collective-permute|reduce-scatter)\(", text)
    assert kinds == ["all-to-all"] * 2
    from eplb_jax.runtime.transport import route_of

    for layer in range(L):
        experts = plan.phy2log[layer]
        route = route_of(experts, experts, E, G, add=True)
        shared = np.asarray(plan.logcnt)[layer][np.asarray(experts)] > 1
        for listed in (route.send, route.receive):
            np.testing.assert_array_equal(
                (np.asarray(listed) >= 0).sum(axis=1), shared.reshape(G, -1).sum(axis=1)
            )


def test_norms_count_an_expert_once(plan):
    logical = RNG.normal(size=(L, E, 7)).astype(np.float32)
    slots = logical[np.arange(L)[:, None], np.asarray(plan.phy2log)]
    once = jax.jit(runtime.mask_replicas)({"up": slots, "bias": slots[..., 0]}, plan)
    for got, wanted in ((once["up"], logical), (once["bias"], logical[..., 0])):
        np.testing.assert_allclose(jnp.sum(got**2), np.sum(wanted**2), rtol=1e-5)
    first = runtime.mask_replicas(slots[1], plan.layer(1))
    np.testing.assert_array_equal(first, once["up"][1])


def test_gradients_of_logical_weights(plan, mesh):
    """Through `to_slots`, without a sum by hand: experts over devices, or on all of them."""
    over = jax.NamedSharding(mesh, P(None, "expert"))
    for experts in (E, 12):
        topology = eplb_jax.Topology(G, 2) if experts == 12 else TOPOLOGY
        layout = eplb_jax.plan(lognormal(L, experts), topology, strategy="greedy")
        weights = jnp.asarray(RNG.normal(size=(L, experts, 5)), jnp.float32)
        slope = RNG.normal(size=(L, layout.phy2log.shape[1], 5)).astype(np.float32)
        spread = jax.device_put(slope, over)

        def loss(weights, layout=layout, spread=spread):
            return jnp.sum(runtime.to_slots({"up": weights}, layout, mesh)["up"] * spread)

        wanted = np.zeros((L, experts, 5))
        for layer, held in enumerate(np.asarray(layout.phy2log)):
            np.add.at(wanted[layer], held, slope[layer].astype(np.float64))
        for gradient in (jax.jit(jax.grad(loss)), jax.grad(jax.jit(jax.checkpoint(loss)))):
            with jax.set_mesh(mesh):
                np.testing.assert_allclose(gradient(weights), wanted, atol=1e-5)


def test_gradients_past_leaves_that_have_none(plan, mesh):
    weights = {"up": jnp.ones((L, E, 3)), "quantised": jnp.ones((L, E), jnp.int8), "bias": None}

    def loss(weights):
        slots = runtime.to_slots(weights, plan, mesh)
        assert slots["bias"] is None
        return jnp.sum(slots["up"]) + jnp.sum(slots["quantised"].astype(jnp.float32))

    got = jax.jit(jax.grad(loss, allow_int=True))(weights)["up"]
    np.testing.assert_array_equal(got, np.repeat(plan.logcnt[..., None], 3, axis=2))


def test_errors(plan, mesh):
    with pytest.raises(
        ValueError, match=r"grads has the shape \(2, 16\); .* begins with \(2, 24\)"
    ):
        runtime.sum_replicas(jnp.zeros((L, E)), plan, mesh)
    with pytest.raises(ValueError, match=r"leaf of the shape \(24,\); .* begins with \(2, 24\)"):
        runtime.mask_replicas(jnp.zeros(R), plan)
    ones = plan._replace(logcnt=jnp.ones_like(plan.logcnt))
    with pytest.raises(ValueError, match="placement is an invalid plan: logcnt of layer 0"):
        runtime.sum_replicas(jnp.zeros((L, R)), ones, mesh)
