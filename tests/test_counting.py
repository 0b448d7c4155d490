"""Loads counted in a running model, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from eplb_jax import runtime

IDS = np.random.default_rng(0).integers(0, 12, (64, 4))
WANTED = np.bincount(IDS.ravel(), minlength=16)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8])
def test_counts_of_ids(dtype):
    load = jax.jit(runtime.expert_counts, static_argnums=1)(IDS.astype(dtype), 16)
    np.testing.assert_array_equal(load, WANTED)
    assert load.dtype == jnp.int32


def test_padding_counts_for_nothing():
    live = np.arange(64) % 3 > 0
    wanted = np.bincount(IDS[live].ravel(), minlength=16)
    # As padding looks in different stacks: masked tokens, masked entries, negative and excess ids.
    entries = np.repeat(live[:, None], 4, axis=1)
    for ids, mask in [
        (IDS, live),
        (IDS, entries),
        (np.where(entries, IDS, -1), None),
        (np.where(entries, IDS, 16), None),
        (np.where(entries, IDS, 2**31 - 1), None),
    ]:
        load = runtime.expert_counts(ids, 16, mask=mask)
        np.testing.assert_array_equal(load, wanted)


def test_uint8_ids_of_256_experts_have_room_for_padding():
    ids = np.array([[255, 3]], np.uint8)
    load = runtime.expert_counts(ids, 256, mask=np.array([[True, False]]))
    assert load.sum() == load[255] == 1


def test_physical_ids_and_slot_counts_become_logical():
    phy2log = jnp.array([[0, 1, 2, 0, 1, 0], [2, 2, 1, 0, 1, 0]])
    slots = np.random.default_rng(1).integers(0, 6, (50, 2))
    for layer in phy2log:
        wanted = np.bincount(np.asarray(layer)[slots].ravel(), minlength=3)
        np.testing.assert_array_equal(runtime.expert_counts_from_slots(slots, layer, 3), wanted)
    counts = jnp.array([[1, 2, 3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], jnp.float32)
    load = jax.jit(runtime.slot_to_expert_counts, static_argnums=2)(counts, phy2log, 3)
    np.testing.assert_array_equal(load, [[11, 7, 3], [10, 8, 3]])
    windows = jnp.stack([counts, 2 * counts])
    load = runtime.slot_to_expert_counts(windows, phy2log, 3)
    np.testing.assert_array_equal(load, [[[11, 7, 3], [10, 8, 3]], [[22, 14, 6], [20, 16, 6]]])
    narrow = runtime.slot_to_expert_counts(jnp.full(6, 100, jnp.int8), phy2log[0], 3)
    np.testing.assert_array_equal(narrow, [300, 200, 100])


def test_counts_are_summed_over_mesh_axes():
    mesh = jax.make_mesh((4, 2), ("data", "expert"))
    axes = ("data", "expert")
    count = partial(runtime.expert_counts, num_experts=16, axis_name=axes)
    spread = jax.device_put(IDS.astype(np.int32), jax.NamedSharding(mesh, P(axes)))
    load = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=P(axes), out_specs=P()))(spread)
    np.testing.assert_array_equal(load, WANTED)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: runtime.expert_counts(jnp.ones((2, 2)), 4), TypeError, "ids must be integers"),
        (
            lambda: runtime.expert_counts(IDS, 4, mask=np.ones(3, bool)),
            ValueError,
            r"mask must have the shape of ids, \(64, 4\), or of its tokens, \(64,\), got \(3,\)",
        ),
        (lambda: runtime.expert_counts(IDS, 0), ValueError, "num_experts=0"),
        (
            lambda: runtime.slot_to_expert_counts(jnp.ones(3), jnp.zeros(4, jnp.int32), 2),
            ValueError,
            r"counts have the shape \(3,\), but phy2log \(4,\)",
        ),
    ],
)
def test_errors(call, error, says):
    with pytest.raises(error, match=says):
        call()
