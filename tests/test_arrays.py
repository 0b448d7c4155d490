"""Gathers, ranks and fixed-point numbers against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax import arrays


@pytest.mark.parametrize("capacity", [1, 2, 3, 9, 64, 2048])
def test_fixed_point_sums_stay_below_the_limit_and_keep_their_worth(capacity):
    weight = np.random.default_rng(0).uniform(0, 2, 4096).astype(np.float32)
    weight[:capacity] = np.nextafter(np.float32(2), np.float32(0))
    for bits in (16, arrays.LOAD_BITS):
        integer = np.asarray(arrays.fixed_point(jnp.asarray(weight), capacity, bits), np.int64)
        assert np.sort(integer)[-capacity:].sum() < 2**bits
        unit = 2.0 ** (arrays.index_bits(capacity) + 1 - bits)
        assert np.all(np.abs(integer * unit - weight) <= unit)


def test_pick_and_first_equal():
    x = jnp.array([[3, 1], [5, 5], [5, 1]])
    np.testing.assert_array_equal(arrays.first_equal(x, jnp.max(x, axis=0)), [1, 1])
    np.testing.assert_array_equal(arrays.pick(x, jnp.array([2, 0], jnp.int32)), [5, 1])
    rows = jnp.array([[2, 0], [0, 1]], jnp.int32)
    np.testing.assert_array_equal(arrays.pick(x, rows), [[5, 1], [3, 5]])
    deep = jnp.arange(12).reshape(3, 2, 2)
    np.testing.assert_array_equal(arrays.pick(deep, rows[0]), [[8, 1], [10, 3]])


@pytest.mark.parametrize("count", [1, 5, 37])
def test_least_row_is_the_first_minimum_below_the_limit(count):
    x = np.random.default_rng(count).integers(0, 9, (count, 50), np.int32)
    beside = np.arange(100, 100 + count * 50, dtype=np.int32).reshape(count, 50)
    least, row, of_row = arrays.least_row(
        jnp.asarray(x), jnp.asarray(beside), jnp.full(50, 3, jnp.int32)
    )
    first, lanes = x.argmin(axis=0), np.arange(50)
    below = x[first, lanes] < 3
    np.testing.assert_array_equal(least, np.where(below, x[first, lanes], 3))
    np.testing.assert_array_equal(row, np.where(below, first, -1))
    np.testing.assert_array_equal(of_row, np.where(below, beside[first, lanes], -1))


def test_descending_is_stable():
    value = np.random.default_rng(0).integers(0, 9, 40, np.int32)
    order = np.asarray(arrays.descending(jnp.asarray(value)))
    np.testing.assert_array_equal(order, np.argsort(-value, kind="stable"))
    np.testing.assert_array_equal(arrays.ranks(jnp.asarray(value))[order], np.arange(40))


def test_loads_are_scaled_by_a_power_of_two():
    load = np.float32([[3, 0, 1], [2.0**127, 1, 0], [1e-30, 5e-31, 0], [0, 0, 0]])
    scaled = np.asarray(arrays.normalise(jnp.asarray(load), -1))
    largest = scaled.max(axis=1)
    assert np.all((largest[:3] >= 1) & (largest[:3] < 4))
    np.testing.assert_array_equal(scaled[3], 0)
    ratio = load[:3, 0] / scaled[:3, 0]
    np.testing.assert_array_equal(np.frexp(ratio)[0], 0.5)
    np.testing.assert_array_equal(scaled[:3] * ratio[:, None], load[:3])


def test_invalid_loads_count_as_zero_and_infinite_ones_as_the_largest():
    load = jnp.asarray([[np.nan, -1.0, np.inf, np.finfo(np.float32).max]])
    cleaned = np.asarray(arrays.sanitise(load))
    np.testing.assert_array_equal(cleaned[0, :2], 0)
    assert cleaned[0, 2] == cleaned[0, 3] > 0
