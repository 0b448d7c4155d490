"""Loads that tests share, and named checks of what every packing must be."""

import numpy as np

import eplb_jax
from eplb_jax.packing.pair_exchange import Pairs

# A strategy that sees windows and compiles in little time.
QUICK = eplb_jax.Strategy(refinement=Pairs(8, two=False))


def lognormal(layers, items, sigma=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.lognormal(sigma=sigma, size=(layers, items)).astype(np.float32)


def replicated(load, num_replicas):
    """The replicas of every layer as items."""
    replication = eplb_jax.replicate_experts(load, num_replicas)
    per_replica = load / np.asarray(replication.logcnt)
    return np.take_along_axis(per_replica, np.asarray(replication.phy2log), 1).astype(np.float32)


def measured(num_replicas=288):
    """The bundled load as items."""
    return replicated(eplb_jax.loads.example().sum(axis=0), num_replicas)


def pack_loads(weight, pack_index, num_packs):
    """Loads in float64."""
    inside = np.asarray(pack_index)[:, None] == np.arange(num_packs)[:, None]
    return np.where(inside, np.asarray(weight, np.float64)[:, None], 0).sum(axis=2)


def mean_imbalance(weight, pack_index, num_packs):
    loads = pack_loads(weight, pack_index, num_packs)
    return (loads.max(axis=1) / loads.mean(axis=1) - 1).mean()


def assert_feasible(packing, num_packs):
    """Every slot of every pack is taken by exactly one item."""
    pack_index, rank = (np.asarray(x) for x in packing)
    n = pack_index.shape[1]
    slots = pack_index * (n // num_packs) + rank
    np.testing.assert_array_equal(
        np.sort(slots, axis=1), np.broadcast_to(np.arange(n), slots.shape)
    )
    assert rank.min(initial=0) >= 0
    assert rank.max(initial=0) < n // num_packs


def assert_same(one, other):
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def repeats(phy2log, num_gpus):
    """How many slots hold an expert that another slot of their GPU holds already, per layer."""
    by_gpu = np.sort(np.asarray(phy2log).reshape(len(phy2log), num_gpus, -1), axis=2)
    return (by_gpu[:, :, 1:] == by_gpu[:, :, :-1]).sum(axis=(1, 2))


def assert_bits(got, wanted):
    for name, x in wanted.items():
        bits = np.asarray(got[name])
        assert bits.dtype == x.dtype
        assert bits.tobytes() == np.ascontiguousarray(x).tobytes(), name
