"""Bad input: every error says what was got and the nearest valid value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import balanced_packing, rebalance_experts, replicate_experts
from tests.helpers import assert_same

LOAD = np.ones((2, 12))


def plan(load=LOAD, replicas=16, groups=4, nodes=2, gpus=8, **options):
    return rebalance_experts(load, replicas, groups, nodes, gpus, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rebalance_experts(np.ones((1, 256)), 290, 8, 4, 32),
            "num_replicas=290 is not a multiple of num_gpus=32; nearest: 288, 320",
        ),
        (lambda: plan(replicas=8), "num_replicas=8 is less than 12; nearest: 16"),
        (
            lambda: plan(replicas=17),
            "num_replicas=17 is not a multiple of num_gpus=8; nearest: 16, 24",
        ),
        (
            lambda: plan(groups=5, nodes=1),
            "num_groups=5 does not divide number of experts=12; nearest: 4, 6",
        ),
        (
            lambda: plan(gpus=16, nodes=3, groups=3),
            "num_nodes=3 does not divide num_gpus=16; nearest: 2, 4",
        ),
        (
            lambda: plan(groups=3, policy="hierarchical"),
            "num_nodes=2 does not divide num_groups=3; nearest: 1, 3",
        ),
        (lambda: plan(gpus=0), "num_gpus=0 is less than 1; nearest: 1"),
        (
            lambda: plan(policy="local"),
            "policy='local' is not known; choose one of: auto, global, hier",
        ),
        (
            lambda: plan(strategy="fastest"),
            "strategy='fastest' is not known; choose one of: auto, fast",
        ),
        (
            lambda: balanced_packing(LOAD, 5),
            "num_packs=5 does not divide number of items=12; nearest: 4, 6",
        ),
        (
            lambda: balanced_packing(LOAD, 13),
            "num_packs=13 does not divide number of items=12; nearest: 12",
        ),
        (
            lambda: balanced_packing(np.ones((1, 40000)), 2),
            "40000 items are too many to pack; nearest: 32768",
        ),
        (lambda: replicate_experts(LOAD, 11), "num_phy=11 is less than 12; nearest: 12"),
        (
            lambda: plan(np.ones(12)),
            r"the shape \[layers, experts\] or \[windows, layers, experts\], got \(12,\)",
        ),
        (lambda: plan(np.ones((2, 3, 4, 5))), r"weight must have the shape .* got \(2, 3, 4, 5\)"),
        (
            lambda: plan(np.ones((0, 3, 4))),
            r"weight must have the shape .* \[windows, layers, experts\], got \(0, 3, 4\)",
        ),
        (lambda: replicate_experts(np.ones((2, 3, 4)), 5), r"the shape .* got \(2, 3, 4\)"),
        (lambda: plan(np.ones((2, 0))), r"weight must have the shape .* got \(2, 0\)"),
        (lambda: plan([[1, 2], [3]]), "weight is not a rectangular array"),
    ],
)
def test_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(gpus=8.0), "num_gpus must be an integer, got 8.0"),
        (lambda: plan([["a", "b"]]), "weight must hold real numbers, got dtype <U1"),
        (
            lambda: plan(np.ones((1, 12), complex)),
            "weight must hold real numbers, got dtype complex128",
        ),
        (lambda: plan(key=3), "key must be a JAX random key, got 3"),
    ],
)
def test_kinds(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e39])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_bad_load_is_named(value, where):
    load = np.ones((3, 12))
    load[2, 7] = value
    shown = "inf" if value == 1e39 else np.float32(value)
    message = f"weight at layer 2, expert 7 is {shown}; loads must be finite and not negative"
    for call in (
        lambda w: plan(w),
        lambda w: replicate_experts(w, 16),
    ):
        with pytest.raises(ValueError, match=message.replace("+", r"\+")):
            call(where(load) if value != 1e39 else load)


def test_inside_jit_bad_loads_have_a_meaning():
    bad = np.asarray([[np.nan, -5, 1, 2, np.inf, 3, 4, 5, 6, 7, 8, 9]], np.float32)
    meant = np.nan_to_num(np.maximum(bad, 0), nan=0, posinf=np.finfo(np.float32).max)
    for call in (
        lambda w: balanced_packing(w, 4, strategy="greedy"),
        lambda w: plan(w, strategy="greedy"),
    ):
        assert_same(jax.jit(call)(jnp.asarray(bad)), call(meant))


def test_old_style_keys_are_taken():
    with jax.legacy_prng_key("allow"):
        old = jax.random.PRNGKey(5)
    assert_same(
        plan(key=old, strategy="restarts"), plan(key=jax.random.key(5), strategy="restarts")
    )
