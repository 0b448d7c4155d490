"""Prints a hash of the plans of each case, computed in one of two ways, at XLA's default flags.

export XLA_FLAGS=--xla_force_host_platform_device_count=8
python tests/default_flags.py parts    # eager, 64 of 320 layers at a time
python tests/default_flags.py sharded  # jit, vmap, layers sharded over the devices
"""

import hashlib
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from eplb_jax import Topology, plan, runtime

LAYERS, PART, EXPERTS = 320, 64, 16
TOPOLOGY = Topology(4, slots=6, num_nodes=2, num_groups=4)
GLOBAL = Topology(4, slots=6)
RNG = np.random.default_rng(0)


def loads():
    """Loads of few distinct values, loads that differ in their last bits, and lognormal ones."""
    tied = RNG.integers(1, 4, (LAYERS // 4, EXPERTS))
    near = 1000 * (1 + 1e-6 * RNG.standard_normal((LAYERS // 4, EXPERTS)))
    drawn = RNG.lognormal(size=(LAYERS // 2, EXPERTS))
    return RNG.permutation(np.concatenate([tied, near, drawn])).astype(np.float32)


def limited(load):
    """A plan within a limit of moves, from experts in order with the last eight twice."""
    held = np.append(np.arange(EXPERTS), np.arange(8, EXPERTS)).reshape(6, 4).T.ravel()
    old = jnp.broadcast_to(jnp.asarray(held, jnp.int32), (load.shape[-2], held.size))
    return plan(load, GLOBAL, previous=old, max_moves=5, strategy="greedy")


WINDOWS = np.stack([loads(), loads(), loads()])
CASES = {
    "auto": (partial(plan, topology=TOPOLOGY), WINDOWS[0]),
    "auto, windows": (partial(plan, topology=GLOBAL), WINDOWS),
    "greedy": (partial(plan, topology=TOPOLOGY, strategy="greedy"), WINDOWS[0]),
    "max_moves": (limited, WINDOWS[0]),
}


def batches(load):
    """The layers in batches: [batch, layer, expert], with windows before the layers."""
    return np.moveaxis(load.reshape(*load.shape[:-2], -1, PART, EXPERTS), -3, 0)


def in_parts(make, load):
    parts = [make(x) for x in batches(load)]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def sharded(make, load):
    batch = batches(load)
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P(*(None,) * (batch.ndim - 2), "layers")
    on_all = jax.device_put(batch, jax.sharding.NamedSharding(mesh, spec))
    return [np.asarray(x) for x in jax.jit(jax.vmap(make))(on_all)]


def check_quotas():
    """They add up to loads as large as int32 holds."""
    held = np.append(np.arange(EXPERTS), np.arange(8))
    load = np.full(EXPERTS, 2**31 - 1, np.int32)
    shares = jnp.asarray(RNG.random(held.size), jnp.float32)
    tokens = runtime.quotas(load, held, shares).tokens
    np.testing.assert_array_equal(np.bincount(held, np.asarray(tokens)), load)


def main():
    compute = {"parts": in_parts, "sharded": sharded}[sys.argv[1]]
    check_quotas()
    for name, (make, load) in CASES.items():
        digest = hashlib.sha256(b"".join(x.tobytes() for x in compute(make, load)))
        print(f"{name}: {digest.hexdigest()}")


if __name__ == "__main__":
    main()
