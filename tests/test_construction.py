import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import lognormal, measured

from eplb_jax.packing import lanes
from eplb_jax.packing.constructions import chunked_greedy, greedy, quantised_greedy

greedy, quantised_greedy, chunked_greedy = (
    jax.jit(x, static_argnums=2) for x in (greedy, quantised_greedy, chunked_greedy)
)
SHAPES = [(4, 2), (12, 3), (12, 6), (30, 5), (64, 8), (288, 32)]


def falling(n, seed=0, ties=False):
    weight = lognormal(1, n, seed=seed)[0]
    weight = np.ceil(weight * 2) if ties else weight
    weight = -np.sort(-weight)
    return (weight / 2 ** np.floor(np.log2(weight.max()))).astype(np.float32)


def orders_of(n, count=20):
    rng = np.random.default_rng(n)
    lpt = np.arange(n)[:, None]
    shuffled = rng.permuted(np.tile(np.arange(n), (count - 1, 1)), axis=1).T
    return np.concatenate([lpt, shuffled], axis=1).astype(np.int32)


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
        lightest_first = sorted(range(num_packs), key=lambda p: (loads[p], p))
        for pack, item in zip(lightest_first, order[start : start + num_packs], strict=True):
            contents[pack].append(int(item))
            loads[pack] += weight[item]
    return [sorted(x) for x in contents], loads


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize(
    ("construction", "slow", "bits"),
    [
        (greedy, slow_greedy, lambda n, m: None),
        (
            quantised_greedy,
            slow_greedy,
            lambda n, m: 30 - lanes.index_bits(m) - lanes.index_bits(n // m + 1),
        ),
        (chunked_greedy, slow_chunked, lambda n, m: 31 - lanes.index_bits(m)),
    ],
    ids=["greedy", "quantised_greedy", "chunked_greedy"],
)
def test_every_lane_as_one_item_at_a_time(construction, slow, bits, n, m, ties):
    weight, orders = falling(n, ties=ties), orders_of(n)
    contents, loads = (
        np.asarray(x) for x in construction(jnp.asarray(weight), jnp.asarray(orders), m)
    )
    exact = bits(n, m)
    if exact is not None:
        weight = np.asarray(lanes.fixed_point(jnp.asarray(weight), n // m, exact))
    for lane in range(orders.shape[1]):
        expected, expected_loads = slow(weight, orders[:, lane], m)
        assert [sorted(x) for x in contents[..., lane].tolist()] == expected
        if construction is chunked_greedy:  # in no promised order
            assert sorted(loads[:, lane]) == sorted(expected_loads)
        else:
            np.testing.assert_array_equal(loads[:, lane], expected_loads)


def test_quantised_loads_stay_close_to_the_exact_greedy():
    weight = -np.sort(-measured(), axis=1)[:8]
    weight = weight / 2 ** np.floor(np.log2(weight[:, :1]))
    order = jnp.arange(288, dtype=jnp.int32)
    for row in weight:
        heaviest = []
        for construction in (greedy, quantised_greedy):
            contents = np.asarray(construction(jnp.asarray(row, jnp.float32), order, 32).contents)
            heaviest.append(row[contents].sum(axis=1).max())
        np.testing.assert_allclose(heaviest[1], heaviest[0], rtol=1e-3)


def test_no_lanes_is_one_lane():
    weight, orders = jnp.asarray(falling(30)), jnp.asarray(orders_of(30))
    for construction in (greedy, quantised_greedy, chunked_greedy):
        one = construction(weight, orders[:, 3], 5)
        many = construction(weight, orders, 5)
        np.testing.assert_array_equal(one.contents, many.contents[..., 3])
        np.testing.assert_array_equal(one.loads, many.loads[..., 3])


def test_the_oracle_itself_on_a_case_done_by_hand():
    pack_index, rank = oracle.balanced_packing([[8, 1, 6, 3, 5, 4]], 3)
    assert pack_index.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert rank.tolist() == [[0, 1, 0, 1, 0, 1]]
