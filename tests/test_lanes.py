import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_jax.packing import lanes


@pytest.mark.parametrize("n", [*range(1, 18), 31, 32, 33, 65, 100, 288])
def test_the_network_sorts_every_lane(n):
    keys = np.random.default_rng(n).integers(-9, 500, (n, lanes.FEW_LANES), np.int32)
    np.testing.assert_array_equal(jax.jit(lanes.sort_lanes)(keys), np.sort(keys, axis=0))


def test_few_lanes_take_the_library_sort_and_agree_with_the_network():
    keys = np.random.default_rng(0).integers(0, 9, (20, lanes.FEW_LANES), np.int32)
    network = lanes.sort_lanes(jnp.asarray(keys))
    np.testing.assert_array_equal(lanes.sort_lanes(jnp.asarray(keys[:, :3])), network[:, :3])
    np.testing.assert_array_equal(lanes.sort_lanes(jnp.asarray(keys[:, 0])), network[:, 0])


def test_the_network_is_a_network_of_comparisons_alone():
    text = str(jax.make_jaxpr(lanes.sort_lanes)(jnp.zeros((9, lanes.FEW_LANES), jnp.int32)))
    assert "min" in text
    assert "sort[" not in text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=2, max_size=40))
def test_falling_order_is_stable_and_falls(values):
    value = np.asarray(values, np.float32)
    order = np.asarray(lanes.falling_order(jnp.asarray(value)))
    assert sorted(order.tolist()) == list(range(len(values)))
    # Keys are cut to the high bits: neighbours may stand wrong only within that resolution.
    resolution = 2.0 ** (lanes.index_bits(len(values)) - 23)
    assert np.all(value[order][1:] <= value[order][:-1] * (1 + resolution) + 1e-37)
    equal = np.flatnonzero(value[order][1:] == value[order][:-1])
    assert np.all(order[equal] < order[equal + 1])


def test_inverse_of_a_permutation():
    permutation = np.random.default_rng(0).permuted(np.tile(np.arange(37), (20, 1)), axis=1).T
    inverse = np.asarray(lanes.inverse(jnp.asarray(permutation, jnp.int32)))
    np.testing.assert_array_equal(
        np.take_along_axis(inverse, permutation, axis=0),
        np.arange(37)[:, None] * np.ones((1, 20), int),
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 9, 64, 2048])
def test_fixed_point_sums_stay_below_the_limit_and_keep_their_worth(capacity):
    weight = np.random.default_rng(0).uniform(0, 2, 4096).astype(np.float32)
    weight[:capacity] = np.nextafter(np.float32(2), np.float32(0))
    for bits in (16, 30):
        integer = np.asarray(lanes.fixed_point(jnp.asarray(weight), capacity, bits), np.int64)
        assert np.sort(integer)[-capacity:].sum() < 2**bits
        unit = 2.0 ** (lanes.index_bits(capacity) + 1 - bits)
        assert np.all(np.abs(integer * unit - weight) <= unit)


def test_pick_and_first_equal():
    x = jnp.array([[3, 1], [5, 5], [5, 1]])
    np.testing.assert_array_equal(lanes.first_equal(x, jnp.max(x, axis=0)), [1, 1])
    np.testing.assert_array_equal(lanes.pick(x, jnp.array([2, 0], jnp.int32)), [5, 1])
    np.testing.assert_array_equal(
        lanes.pick(x, jnp.array([[2, 0], [0, 1]], jnp.int32)), [[5, 1], [3, 5]]
    )
    deep = jnp.arange(12).reshape(3, 2, 2)
    np.testing.assert_array_equal(lanes.pick(deep, jnp.array([2, 0], jnp.int32)), [[8, 1], [10, 3]])
