import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eplb_jax.packing.orders import Lpt, NoisyLpt, RampedLpt, Shuffle, Zigzag

KEY = jax.random.key(0)


def test_lpt_takes_the_ranks_in_turn():
    np.testing.assert_array_equal(Lpt().draw(KEY, 4), [[0], [1], [2], [3]])


@pytest.mark.parametrize(("n", "order"), [(1, [0]), (4, [0, 3, 1, 2]), (5, [0, 4, 1, 3, 2])])
def test_zigzag_takes_large_and_small_items_in_turn(n, order):
    np.testing.assert_array_equal(np.asarray(Zigzag().draw(KEY, n))[:, 0], order)


def test_shuffles_are_distinct_permutations_that_depend_on_the_key_alone():
    drawn = np.asarray(Shuffle(20).draw(KEY, 50))
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.tile(np.arange(50)[:, None], 20))
    assert len({tuple(x) for x in drawn.T}) == 20
    assert abs(np.corrcoef(np.arange(50), drawn.mean(axis=1))[0, 1]) < 0.6
    np.testing.assert_array_equal(drawn, Shuffle(20).draw(jax.random.key(0), 50))
    assert not jnp.array_equal(drawn, Shuffle(20).draw(jax.random.key(1), 50))


def test_noise_fills_its_range():
    factors = np.asarray(NoisyLpt(100, 0.8, 1.2).draw(KEY, 400))
    assert factors.min() >= np.float32(0.8)
    assert factors.max() <= np.float32(1.2)
    np.testing.assert_allclose([factors.mean(), factors.std()], [1, 0.4 / 12**0.5], rtol=0.01)


def test_ramped_noise_grows_from_candidate_to_candidate():
    factors = np.asarray(RampedLpt(5, 0.0, 0.2).draw(KEY, 4000))
    np.testing.assert_array_equal(factors[:, 0], 1)
    np.testing.assert_allclose(factors.max(axis=0), 1 + np.linspace(0, 0.2, 5), atol=1e-3)
    np.testing.assert_allclose(factors.mean(axis=0), 1 + np.linspace(0, 0.1, 5), atol=5e-3)
