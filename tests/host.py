"""One of two processes with four devices each: `python -m tests.host RANK ADDRESS`."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import runtime

L, E, R, G = 8, 16, 24, 8
TOPOLOGY = eplb_jax.Topology(G, R // G)


def assert_shards(array, wanted):
    """Those of this process."""
    assert len(array.addressable_shards) == 4
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[shard.index])


def main(rank, address):
    jax.distributed.initialize(address, 2, rank)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    mesh = jax.make_mesh((8,), ("expert",))
    load = np.random.default_rng(0).lognormal(size=(L, E)).astype(np.float32)
    spread = jax.make_array_from_callback(
        load.shape, NamedSharding(mesh, P("expert")), lambda index: load[index]
    )
    # Every host plans the layers that lie on it, without communication.
    planned = jax.jit(lambda x: eplb_jax.plan(x, TOPOLOGY, strategy="greedy"))
    text = planned.lower(spread).compile().as_text()
    assert not any(f"{kind}(" in text for kind in ("all-reduce", "all-gather", "all-to-all"))
    new = planned(spread)
    alone = eplb_jax.plan(load, TOPOLOGY, strategy="greedy")
    for got, wanted in zip(new, alone, strict=True):
        assert_shards(got, np.asarray(wanted))

    old = eplb_jax.plan(load[::-1].copy(), TOPOLOGY, strategy="greedy")
    logical = np.random.default_rng(1).normal(size=(L, E, 5)).astype(np.float32)

    def rows(plan):
        return logical[np.arange(L)[:, None], np.asarray(plan.phy2log)]

    weights = runtime.to_slots(logical, old, mesh)
    assert_shards(weights, rows(old))
    moved, plan = runtime.relocate(weights, old, new, mesh)
    assert_shards(moved, rows(alone))
    assert_shards(plan.phy2log, np.asarray(alone.phy2log))
    assert_shards(runtime.to_logical(moved, plan, mesh), logical)
    # A plan that no host has whole is rejected, too, in layers where it is invalid.
    is_whole = np.arange(L)[:, None] != 3
    broken = jax.jit(lambda x: x._replace(phy2log=x.phy2log * is_whole))(new)
    kept, plan = runtime.relocate(weights, old, broken, mesh)
    mixed = runtime.select_layers(alone, old, np.arange(L) == 3)
    assert_shards(kept, rows(mixed))
    print("followed the plan")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    main(int(sys.argv[1]), sys.argv[2])
