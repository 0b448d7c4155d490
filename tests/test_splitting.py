"""Shares of replicas, against the linear program as HiGHS solves it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.optimize import linprog
from scipy.sparse import coo_array

import eplb_jax
from eplb_jax import Topology, metrics, runtime
from tests.helpers import QUICK, lognormal


def least_max(load, phy2log, num_gpus):
    """The least possible maximum GPU load of a layer, in tokens."""
    num_slots, num_experts = len(phy2log), len(load)
    slot = np.arange(num_slots)
    gpu = slot // (num_slots // num_gpus)
    # Unknown: the tokens of every slot, and the maximum GPU load.
    sums = coo_array((np.ones(num_slots), (phy2log, slot)), (num_experts, num_slots + 1))
    heavy = coo_array(
        (
            np.r_[np.ones(num_slots), -np.ones(num_gpus)],
            (np.r_[gpu, np.arange(num_gpus)], np.r_[slot, np.full(num_gpus, num_slots)]),
        )
    )
    cost = np.r_[np.zeros(num_slots), 1]
    scale = max(load.sum(), 1e-30) / num_gpus
    solved = linprog(cost, heavy, np.zeros(num_gpus), sums, load / scale, method="highs")
    assert solved.status == 0
    return solved.fun * scale


def topology_of(plan, num_gpus):
    return Topology.of_replicas(plan.phy2log.shape[-1], num_gpus)


def misfit(load, num_replicas, num_gpus, strategy="greedy"):
    """A plan made for other loads, so that much is left to the split."""
    other = np.random.default_rng(1).permutation(load, axis=1)
    return eplb_jax.plan(
        np.sqrt(load * other), Topology.of_replicas(num_replicas, num_gpus), strategy=strategy
    )


def next_window(name, past, coming, num_replicas, num_gpus):
    trace = eplb_jax.loads.example(name)
    plan = eplb_jax.plan(
        trace[past], Topology.of_replicas(num_replicas, num_gpus), strategy="greedy"
    )
    return trace[coming], plan, num_gpus


def twenty_replicas():
    load = lognormal(4, 64)
    hot = np.where(np.arange(64) < 2, 30, load).astype(np.float32)
    return load, eplb_jax.plan(hot, Topology.of_replicas(112, 16), strategy="greedy"), 16


def chain():
    """64 GPUs, of which each shares an expert with the next alone; loads in a half, or an end."""
    rng = np.random.default_rng(0)
    experts = np.stack([np.arange(64), np.arange(1, 65)], axis=1)
    half = np.where(np.arange(65) < 32, 1.5, 0.5) * rng.uniform(0.9, 1.1, (6, 65))
    load = np.concatenate([half, np.linspace(4, 0.1, 65)[None]]).astype(np.float32)
    return load, eplb_jax.placement_of(np.tile(experts.reshape(1, -1), (7, 1))), 64


def duplicates():
    return lognormal(1, 64), eplb_jax.placement_of([[*range(64), *[0] * 8]]), 4


CASES = {
    "gpt-oss, next window": lambda: next_window("gpt_oss_20b", 0, 1, 40, 8),
    "V2-Lite, another task": lambda: next_window("deepseek_v2_lite", 0, 9, 80, 16),
    "lognormal": lambda: (lognormal(4, 64), misfit(lognormal(4, 64), 96, 8), 8),
    "many replicas": lambda: (lognormal(4, 64), misfit(lognormal(4, 64), 256, 16, "greedy"), 16),
    "twenty replicas": twenty_replicas,
    "duplicates on a GPU": duplicates,
    "chain": chain,
}


@pytest.mark.parametrize("case", CASES)
def test_within_half_a_percent_of_the_optimum(case):
    load, plan, num_gpus = CASES[case]()
    shares = runtime.split_load(load, plan, topology_of(plan, num_gpus))
    got = metrics.gpu_loads(load, plan, topology_of(plan, num_gpus), split=shares).max(axis=1)
    phy2log = np.asarray(plan.phy2log)
    best = [
        least_max(np.asarray(x, float), y, num_gpus) for x, y in zip(load, phy2log, strict=True)
    ]
    assert (got / np.array(best) >= 1 - 1e-5).all()
    assert (got / np.array(best) <= 1.005).all()
    even = metrics.gpu_loads(load, plan, topology_of(plan, num_gpus)).max(axis=1)
    assert (got <= even * (1 + 1e-6)).all()
    whole = np.stack([np.bincount(y, x) for x, y in zip(np.asarray(shares), phy2log, strict=True)])
    np.testing.assert_allclose(whole, 1, rtol=1e-5)
    assert (np.asarray(shares) >= 0).all()


def test_a_start_from_shares_of_a_similar_load_saves_steps():
    load, plan, num_gpus = chain()
    topology, rng = topology_of(plan, num_gpus), np.random.default_rng(1)
    later = (load * rng.lognormal(0, 0.01, load.shape)).astype(np.float32)
    phy2log = np.asarray(plan.phy2log)
    best = [
        least_max(np.asarray(x, float), y, num_gpus) for x, y in zip(later, phy2log, strict=True)
    ]

    def excess(**options):
        shares = runtime.split_load(later, plan, topology, steps=8, **options)
        loads = metrics.gpu_loads(later, plan, topology, split=shares)
        return float(np.mean(loads.max(axis=1) / np.array(best))) - 1

    start = runtime.split_load(load, plan, topology)
    assert excess(start=start) < 0.003 < 0.03 < excess()
    one = runtime.split_load(later[0], plan.layer(0), topology, steps=8, start=start[0])
    np.testing.assert_allclose(one.sum(), 65, rtol=1e-5)
    with pytest.raises(ValueError, match="start has the shape"):
        runtime.split_load(later, plan, topology, start=start[:, 1:])


def test_next_windows_of_gpt_oss():
    """Of what plans from eight windows leave of the next, the split leaves a quarter."""
    trace = eplb_jax.loads.example("gpt_oss_20b")
    even, split = [], []
    for start in range(0, 18, 2):
        plan = eplb_jax.plan(trace[start : start + 8], Topology.of_replicas(40, 8), strategy=QUICK)
        load = trace[start + 8]
        shares = runtime.split_load(load, plan, topology_of(plan, 8))
        even.append(metrics.balance(load, plan, topology_of(plan, 8)).mean_imbalance)
        split.append(metrics.balance(load, plan, topology_of(plan, 8), split=shares).mean_imbalance)
    assert np.mean(split) < 0.3 * np.mean(even)


@pytest.mark.quality
def test_next_windows_of_v2_lite():
    """At most 0.6 of the even split's imbalance."""
    trace = eplb_jax.loads.example("deepseek_v2_lite")
    even, split = [], []
    for now in (10, 14, 18, 22, 26, 30):  # in the middle and at the end of tasks
        plan = eplb_jax.plan(trace[now - 8 : now], Topology.of_replicas(72, 8), strategy=QUICK)
        shares = runtime.split_load(trace[now], plan, topology_of(plan, 8))
        even.append(metrics.balance(trace[now], plan, topology_of(plan, 8)).mean_imbalance)
        split.append(
            metrics.balance(trace[now], plan, topology_of(plan, 8), split=shares).mean_imbalance
        )
    assert np.mean(split) < 0.6 * np.mean(even)


def test_inside_shard_map():
    """Of loads that differ from device to device, as JAX checks them."""
    load, mesh = lognormal(8, 16), jax.make_mesh((8,), ("data",))
    plan = misfit(load, 24, 4)
    split = partial(runtime.split_load, topology=topology_of(plan, 4))
    mapped = jax.shard_map(split, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    lies = NamedSharding(mesh, P("data"))
    shares = jax.jit(mapped)(*jax.device_put((load, plan), lies))
    np.testing.assert_allclose(shares, split(load, plan), atol=1e-2)


def test_hard_loads():
    load = np.zeros((4, 16), np.float32)
    load[1, 3] = 5
    load[2] = 1
    load[3] = 3e38
    plan = eplb_jax.plan(lognormal(4, 16), Topology.of_replicas(24, 4), strategy="greedy")
    shares = np.asarray(runtime.split_load(load, plan, topology_of(plan, 4)))
    count = np.take_along_axis(np.asarray(plan.logcnt), np.asarray(plan.phy2log), axis=1)
    np.testing.assert_allclose(shares[0], 1 / count[0])
    assert np.isfinite(shares).all()
    for layer in (2, 3):
        got = metrics.gpu_loads(
            np.ones_like(load), plan, topology_of(plan, 4), split=jnp.asarray(shares)
        )[layer].max()
        best = least_max(np.ones(16), np.asarray(plan.phy2log)[layer], 4)
        assert best * (1 - 1e-5) <= got <= best * 1.005


def test_windows():
    load = lognormal(6, 32).reshape(2, 3, 32)
    plan = misfit(load[0], 48, 8)
    shares = runtime.split_load(load, np.asarray(plan.phy2log), topology_of(plan, 8))
    assert shares.shape == (2, 3, 48)
    alone = runtime.split_load(load[1], plan, topology_of(plan, 8))
    np.testing.assert_allclose(shares[1], alone, atol=1e-2)


def test_nothing_to_split():
    plan = eplb_jax.plan(lognormal(2, 16), Topology.of_replicas(16, 4), strategy="greedy")
    np.testing.assert_array_equal(
        runtime.split_load(lognormal(2, 16), plan, topology_of(plan, 4)), np.ones((2, 16))
    )


def test_layer_by_layer_and_jitted_and_without_compiling_anew():
    load = lognormal(3, 32)
    plans = [misfit(lognormal(3, 32, seed=s), 48, 8) for s in range(2)]
    jitted = jax.jit(partial(runtime.split_load, topology=topology_of(plans[0], 8)))
    for plan in plans:
        whole = runtime.split_load(load, plan, topology_of(plan, 8))
        np.testing.assert_allclose(jitted(load, plan), whole, atol=1e-2)
        for layer in range(3):
            alone = runtime.split_load(load[layer], plan.layer(layer), topology_of(plan, 8))
            np.testing.assert_allclose(alone, whole[layer], atol=1e-2)
    assert jitted._cache_size() == 1


def test_layers_over_explicit_axes():
    mesh = jax.make_mesh((4,), ("layers",), devices=jax.devices()[:4])
    load, sharding = lognormal(4, 32), jax.NamedSharding(mesh, P("layers"))
    plan = misfit(load, 48, 8)
    spread = jax.device_put((load, plan), sharding)
    shares = runtime.split_load(*spread, topology_of(plan, 8))
    np.testing.assert_allclose(
        shares, runtime.split_load(load, plan, topology_of(plan, 8)), atol=1e-2
    )
    assert shares.sharding.spec[0] == "layers"


def test_errors():
    plan = eplb_jax.plan(lognormal(2, 16), Topology.of_replicas(24, 4), strategy="greedy")
    for call, says in [
        (
            lambda: runtime.split_load(lognormal(2, 8), plan, topology_of(plan, 4)),
            r"\(2, 8\), but the plan is for",
        ),
        (
            lambda: runtime.split_load(lognormal(2, 16), plan, Topology(5, 5)),
            "25 in total, but the plan has 24",
        ),
        (
            lambda: runtime.split_load(-lognormal(2, 16), plan, topology_of(plan, 4)),
            "layer 0, expert 0",
        ),
        (
            lambda: runtime.split_load(lognormal(1, 16)[0], plan, topology_of(plan, 4)),
            "but the plan is for",
        ),
        (
            lambda: runtime.split_load(lognormal(2, 16), plan, topology_of(plan, 4), steps=-1),
            "steps=-1",
        ),
        (
            lambda: metrics.balance(
                lognormal(2, 16), plan, topology_of(plan, 4), split=jnp.ones((2, 16))
            ),
            r"split has the shape \(2, 16\)",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
