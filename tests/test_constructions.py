"""Constructions, lane by lane, against one item at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.arrays import index_bits
from eplb_jax.packing.constructions import chunked_greedy, greedy, quantised_greedy
from eplb_jax.packing.items import items_of
from tests import oracle
from tests.helpers import lognormal, measured

LANES = 20
CONSTRUCTIONS = {
    x.__name__: jax.jit(x, static_argnums=2) for x in (greedy, quantised_greedy, chunked_greedy)
}


@functools.cache
def instance(n, m):
    """Descending weights and orders, others in every lane; with ties in every second lane."""
    weight = lognormal(LANES, n, seed=n)
    weight[1::2] = np.ceil(weight[1::2] * 2)
    orders = np.tile(np.arange(n, dtype=np.int32), (LANES, 1))
    orders = np.random.default_rng(n).permuted(orders, axis=1)
    orders[:4] = np.arange(n)
    return items_of(jnp.asarray(-np.sort(-weight, axis=1).T), m), jnp.asarray(orders.T)


def slow_greedy(weight, order, num_packs):
    contents = [[] for _ in range(num_packs)]
    loads = [weight.dtype.type(0)] * num_packs
    for item in order:
        room = [p for p in range(num_packs) if len(contents[p]) < len(order) // num_packs]
        pack = min(room, key=lambda p: loads[p])
        contents[pack].append(int(item))
        loads[pack] += weight[item]
    return [sorted(x) for x in contents], loads


def slow_chunked(weight, order, num_packs):
    contents = [[] for _ in range(num_packs)]
    loads = [0] * num_packs
    for start in range(0, len(order), num_packs):
        ascending = sorted(range(num_packs), key=lambda p: (loads[p], p))
        for pack, item in zip(ascending, order[start : start + num_packs], strict=True):
            contents[pack].append(int(item))
            loads[pack] += weight[item]
    return [sorted(x) for x in contents], loads


@pytest.mark.parametrize(("n", "m"), [(12, 6), (30, 5), (64, 8)])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_every_lane_as_one_item_at_a_time(name, n, m):
    items, orders = instance(n, m)
    contents, loads = (np.asarray(x) for x in CONSTRUCTIONS[name](items, orders, m))
    weight, slow = np.asarray(items.units), slow_greedy
    if name == "greedy":
        weight = np.asarray(items.weight)
    elif name == "quantised_greedy":
        weight = weight >> (index_bits(m) + index_bits(n // m + 1))
    else:
        weight, slow = weight >> (index_bits(m) - 1), slow_chunked
    for lane in range(LANES):
        expected, expected_loads = slow(weight[:, lane], np.asarray(orders)[:, lane], m)
        assert [sorted(x) for x in contents[..., lane].tolist()] == expected
        if slow is slow_chunked:  # its loads are in no particular order
            assert sorted(loads[:, lane]) == sorted(expected_loads)
        else:
            np.testing.assert_array_equal(loads[:, lane], expected_loads)


def test_quantised_loads_stay_close_to_the_exact_greedy():
    weight = -np.sort(-measured(), axis=1)[:8]
    items = items_of(jnp.asarray(weight.T), 32)
    order = jnp.tile(jnp.arange(288, dtype=jnp.int32)[:, None], (1, 8))
    largest = []
    for name in ("greedy", "quantised_greedy"):
        contents = np.asarray(CONSTRUCTIONS[name](items, order, 32).contents)
        loads = np.take_along_axis(weight.T[:, None], contents, axis=0).sum(axis=1)
        largest.append(loads.max(axis=0))
    np.testing.assert_allclose(largest[1], largest[0], rtol=1e-3)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_no_lanes_is_one_lane(name):
    items, orders = instance(30, 5)
    many = CONSTRUCTIONS[name](items, orders, 5)
    one = CONSTRUCTIONS[name](jax.tree.map(lambda x: x[..., 7], items), orders[:, 7], 5)
    np.testing.assert_array_equal(one.contents, many.contents[..., 7])
    np.testing.assert_array_equal(one.loads, many.loads[..., 7])


def test_items_are_repeated_layer_by_layer():
    items, _ = instance(12, 6)
    repeated = items.repeat(3)
    assert repeated.windows.shape == (1, 12, 3 * LANES)
    for lane in range(3 * LANES):
        np.testing.assert_array_equal(repeated.units[:, lane], items.units[:, lane // 3])
        np.testing.assert_array_equal(repeated.windows[0, :, lane], items.units[:, lane // 3])


def test_the_oracle_itself_on_a_case_done_by_hand():
    pack_index, rank = oracle.balanced_packing([[8, 1, 6, 3, 5, 4]], 3)
    assert pack_index.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert rank.tolist() == [[0, 1, 0, 1, 0, 1]]
