"""Loads that tests share, and named checks of what every packing must be."""

import functools
import itertools
import re

import numpy as np

import eplb_jax
from eplb_jax.packing.pair_exchange import Pairs

COLLECTIVES = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
)

# A strategy that uses windows and compiles in little time.
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


def duplicates(phy2log, num_gpus):
    """How many slots of every layer hold an expert that another slot of their GPU holds."""
    by_gpu = np.sort(np.asarray(phy2log).reshape(len(phy2log), num_gpus, -1), axis=2)
    return (by_gpu[:, :, 1:] == by_gpu[:, :, :-1]).sum(axis=(1, 2))


@functools.cache
def packings(n, m):
    """Every way to fill m packs that are alike, [ways, m, n / m]."""

    def ways(items):
        if not items:
            yield ()
            return
        for rest in itertools.combinations(items[1:], n // m - 1):
            left = [x for x in items[1:] if x not in rest]
            for others in ways(left):
                yield ((items[0], *rest), *others)

    return np.array(list(ways(tuple(range(n)))))


def assert_bits(got, wanted):
    """The same arrays by name, to the bit."""
    for name, x in wanted.items():
        bits = np.asarray(got[name])
        assert bits.dtype == x.dtype
        assert bits.tobytes() == np.ascontiguousarray(x).tobytes(), name


def noisy(seconds, noise=0.005, outliers=0.05, seed=0):
    """Measured times: relative noise, and some steps that take twice as long."""
    rng = np.random.default_rng(seed)
    slow = 1 + (rng.random(len(seconds)) < outliers)
    off = rng.normal(size=np.shape(seconds)) * noise
    return seconds * (1 + off) * slow.reshape(-1, *[1] * (np.ndim(seconds) - 1))


def assert_within(fit, **true):
    """Coefficients are within three standard errors, which say something."""
    for name, value in true.items():
        error = getattr(fit.error, name)
        assert abs(getattr(fit.value, name) - value) < 3 * error, name
        assert error < 0.5 * value, name
