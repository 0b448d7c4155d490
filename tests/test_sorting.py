"""Sorts of many lanes against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_jax.arrays import index_bits
from eplb_jax.packing import sorting

N = 24
orders_of = jax.jit(lambda x: (sorting.descending_order(x), sorting.exact_descending_order(x)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 8, 13, 17, 32, 33, 100])
def test_the_network_sorts_every_lane(n):
    keys = np.random.default_rng(n).integers(-9, 500, (n, sorting.FEW_LANES), np.int32)
    np.testing.assert_array_equal(jax.jit(sorting.sort_lanes)(keys), np.sort(keys, axis=0))


def test_few_lanes_take_the_library_sort_and_agree_with_the_network():
    keys = np.random.default_rng(0).integers(0, 9, (17, sorting.FEW_LANES), np.int32)
    network = jax.jit(sorting.sort_lanes)(keys)
    np.testing.assert_array_equal(sorting.sort_lanes(jnp.asarray(keys[:, :3])), network[:, :3])
    np.testing.assert_array_equal(sorting.sort_lanes(jnp.asarray(keys[:, 0])), network[:, 0])


def test_the_network_is_a_network_of_comparisons_alone():
    text = str(jax.make_jaxpr(sorting.sort_lanes)(jnp.zeros((9, sorting.FEW_LANES), jnp.int32)))
    assert "min" in text
    assert "sort[" not in text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=N, max_size=N))
def test_descending_orders_are_stable_and_descend(values):
    value = np.asarray(values, np.float32)
    order, exact = (np.asarray(x) for x in orders_of(value))
    np.testing.assert_array_equal(exact, np.argsort(-value, kind="stable"))
    assert sorted(order.tolist()) == list(range(N))
    # Keys are cut to the high bits: neighbours may stand wrong only within that resolution.
    resolution = 2.0 ** (index_bits(N) - 23)
    assert np.all(value[order][1:] <= value[order][:-1] * (1 + resolution) + 1e-37)
    equal = np.flatnonzero(value[order][1:] == value[order][:-1])
    assert np.all(order[equal] < order[equal + 1])


def test_inverse_of_a_permutation():
    permutation = np.random.default_rng(0).permuted(np.tile(np.arange(37), (20, 1)), axis=1).T
    inverse = np.asarray(sorting.inverse(jnp.asarray(permutation, jnp.int32)))
    np.testing.assert_array_equal(
        np.take_along_axis(inverse, permutation, axis=0),
        np.tile(np.arange(37)[:, None], (1, 20)),
    )
