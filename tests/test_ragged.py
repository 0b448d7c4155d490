"""Weights that follow plans by a ragged all-to-all, which XLA does not have on CPUs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import eplb_jax
from eplb_jax import runtime
from eplb_jax.types import Placement
from tests.helpers import assert_bits, lognormal

L, E, R, G = 3, 32, 40, 8
TOPOLOGY = eplb_jax.Topology(G, R // G, num_nodes=2)
LOGICAL = {
    "bias": -np.zeros((L, E), np.float32),
    "half": np.asarray(jnp.asarray(lognormal(L * E, 5).reshape(L, E, 5), jnp.bfloat16)),
}


def modelled(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` as documented, for ranges of one row."""
    size, me = lax.axis_size(axis_name), lax.axis_index(axis_name)
    per_device = len(input_offsets) // size
    maps = [
        lax.all_gather(x.reshape(size, per_device), axis_name)[:, me]
        for x in (input_offsets, send_sizes, output_offsets)
    ]
    tables = lax.all_gather(operand, axis_name)
    received = recv_sizes.reshape(size, per_device)
    for source in range(size):
        for number in range(per_device):
            start, sent, place = (x[source, number] for x in maps)
            there = (sent == 1) & (received[source, number] == 1)
            place = jnp.where(there, place, output.shape[0])
            output = output.at[place].set(tables[source, start], mode="drop")
    return output


def test_rows_go_as_moves_says(monkeypatch):
    """On a model of the operation, which XLA does not have on CPUs."""
    sent = []

    def watched(*args, **kwargs):
        jax.debug.callback(lambda x: sent.append(int(x.sum())), args[3])
        return modelled(*args, **kwargs)

    monkeypatch.setattr(lax, "ragged_all_to_all", watched)
    mesh = jax.make_mesh((8,), ("expert",))
    old, new = (eplb_jax.plan(lognormal(L, E, seed=x), TOPOLOGY, strategy="greedy") for x in (0, 3))
    weights = runtime.to_slots(LOGICAL, old, mesh)
    moved, _ = runtime.relocate(weights, old, new, mesh, ragged=True, num_nodes=2)
    layer, slots = np.arange(L)[:, None], np.asarray(new.phy2log)
    assert_bits(moved, {k: x[layer, slots] for k, x in LOGICAL.items()})
    jax.effects_barrier()
    assert sum(sent) == len(weights) * int(eplb_jax.moves(old, new, TOPOLOGY).received.sum())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_is_lowered_for(platform):
    mesh = jax.sharding.AbstractMesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    shapes = (L, R), (L, E, R - E + 1), (L, E)
    shapes = Placement(*(jax.ShapeDtypeStruct(x, jnp.int32) for x in shapes))
    weights = {"up": jax.ShapeDtypeStruct((L, R, 4, 6), jnp.float32)}
    move = jax.jit(lambda w, old, new: runtime.relocate(w, old, new, mesh, ragged=True))
    text = move.trace(weights, shapes, shapes).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"ragged_all_to_all", text)) >= 1
    assert "all_gather" not in text
