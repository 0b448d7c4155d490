"""Exchange of rows of sharded tables between the slots that hold experts and those that need them.

The G devices of a mesh axis hold equal ranges of slots. Every device has the same small integer
maps of who sends and who receives, so no metadata is exchanged and a new plan compiles nothing.

A row travels in two hops. Its sender cuts it into G chunks, one for every device; each device then
sends its chunk to every device that needs the row. A round of either hop is one all-to-all of one
row per device. There are as many rounds as the busiest device has rows to send, or to receive; none
where nothing moves. An expert that many devices need is sent once. Chunks of replicas can be summed
between the hops, once for all replicas, which keeps these equal bit for bit.

Where XLA has a ragged all-to-all, on GPUs and TPUs, rows can go in one hop instead, from the slots
that `eplb_jax.moves` names.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int32

from eplb_jax.planning.placement import count_replicas, first_positions
from eplb_jax.runtime.layout import Layout, put
from eplb_jax.types import AxisName

NONE = -1


def transport(
    leaves: list[Array],
    layout: Layout,
    held: Int32[Array | np.ndarray, "*L S"],
    wanted: Int32[Array | np.ndarray, "*L Z"],
    changes: Bool[Array | np.ndarray, "*L"],
    num_experts: int,
    *,
    source: Int32[Array, "*L Z"] | None = None,
    add: bool = False,
) -> list[Array]:
    """Tables [*L, Z, ...] of the wanted rows, from tables [*L, S, ...] of the rows held.

    Layers are exchanged one after the other, each in place where S = Z. Maps have the expert of
    every row, or -1: such a row keeps what it holds, or holds anything where S and Z differ. Layers
    without `changes` are skipped; if S and Z differ, all must change. `source` is the row to copy
    from, by a ragged all-to-all; None: two hops. With `add`, every wanted row is the sum of all
    rows of its expert.
    """
    maps = (put(x, layout, PartitionSpec()) for x in (held, wanted, changes))
    source = None if source is None else put(source, layout, PartitionSpec())
    leaves = [put(x, layout, spec) for x, spec in zip(leaves, layout.specs, strict=True)]
    return _transport(leaves, *maps, source, num_experts=num_experts, layout=layout, add=add)


@partial(jax.jit, static_argnames=("num_experts", "layout", "add"))
def _transport(
    leaves: list[Array],
    held: Int32[Array, "*L S"],
    wanted: Int32[Array, "*L Z"],
    changes: Bool[Array, "*L"],
    source: Int32[Array, "*L Z"] | None,
    *,
    num_experts: int,
    layout: Layout,
    add: bool,
) -> list[Array]:
    num_gpus, axis_name, single = layout.num_gpus, layout.axis_name, held.ndim == 1

    def on_device(
        leaves: list[Array], held: Array, wanted: Array, changes: Array, source: Array | None
    ) -> list[Array]:
        if single:
            leaves, held, wanted, changes, source = jax.tree.map(
                lambda x: x[None], (leaves, held, wanted, changes, source)
            )
        layers = jnp.argsort(~changes, stable=True)
        rows = leaves
        if held.shape != wanted.shape:
            size = wanted.shape[1] // num_gpus
            rows = [jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype) for x in leaves]

        def one_layer(number: Array, rows: list[Array]) -> list[Array]:
            layer = layers[number]
            tables = [x[layer] for x in (rows if held.shape == wanted.shape else leaves)]
            if source is None:
                route = route_of(held[layer], wanted[layer], num_experts, num_gpus, add=add)
                exchange = partial(_two_hops, route=route, num_experts=num_experts, add=add)
            else:
                exchange = partial(_ragged, source=source[layer].reshape(num_gpus, -1))
            tables = [exchange(x, axis_name=axis_name) for x in tables]
            return [x.at[layer].set(y) for x, y in zip(rows, tables, strict=True)]

        rows = lax.fori_loop(0, jnp.sum(changes, dtype=jnp.int32), one_layer, rows)
        return [x[0] for x in rows] if single else rows

    specs = list(layout.specs)
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(specs, *(PartitionSpec(),) * 4),
        out_specs=specs,
        check_vma=False,
    )(leaves, held, wanted, changes, source)


class Route(NamedTuple):
    """The rows that every device keeps, sends and receives.

    The expert of every slot before and after; for every slot after, the slot of the same device to
    copy from; and the slots that a device sends and receives, round by round, then `NONE`.
    """

    held: Int32[Array, "G s"]
    wanted: Int32[Array, "G z"]
    local: Int32[Array, "G z"]
    send: Int32[Array, "G s"]
    receive: Int32[Array, "G z"]

    @property
    def rounds(self) -> tuple[Array, Array]:
        """Number of rounds of sending and of receiving, int32."""
        send, receive = (jnp.sum(x != NONE, axis=1, dtype=jnp.int32) for x in self[3:])
        return jnp.max(send), jnp.max(receive)


def route_of(
    held: Int32[Array, " S"],
    wanted: Int32[Array, " Z"],
    num_experts: int,
    num_gpus: int,
    *,
    add: bool = False,
) -> Route:
    """The route of a layer: copies from the own device where it holds the expert, else by hops.

    One device sends an expert that others need; where several could, they take turns. With `add`,
    all slots of experts with replicas or on the move send and receive.
    """
    held, wanted = held.reshape(num_gpus, -1), wanted.reshape(num_gpus, -1)
    size, first = held.shape[1], first_positions(held.reshape(-1), num_experts, num_gpus)
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
    place = jnp.arange(size, dtype=jnp.int32)[None]
    local = jnp.where(wanted < 0, 0, first[wanted, gpu])
    if held.shape == wanted.shape:
        local = jnp.where((held == wanted) | (wanted < 0), place, local)
    receives = local == size
    needed = jnp.zeros(num_experts, bool).at[wanted].max(receives)
    if add:
        moving = needed | (count_replicas(held.reshape(-1), num_experts) > 1)
        sends, receives = moving[held] & (held >= 0), moving[wanted] & (wanted >= 0)
    else:
        turn = jnp.cumsum(needed, dtype=jnp.int32) - 1
        holders = jnp.cumsum(first < size, axis=1, dtype=jnp.int32)
        due = turn % jnp.maximum(holders[:, -1], 1) + 1
        sender = (first < size) & (holders == due[:, None]) & needed[:, None]
        sends = sender[held, gpu] & (first[held, gpu] == place)
    local = jnp.where(receives, NONE, local)
    return Route(held, wanted, local, _list(sends), _list(receives))


def _list(chosen: Bool[Array, "G s"]) -> Int32[Array, "G s"]:
    """The chosen positions of every row, in order, then `NONE`."""
    places = jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)
    return jnp.where(jnp.take_along_axis(chosen, places, axis=1), places, NONE)


def _two_hops(
    table: Array, route: Route, num_experts: int, axis_name: AxisName, *, add: bool
) -> Array:
    """The rows [z, ...] of this device after the exchange, from its rows [s, ...].

    Sums are formed in float32 where the table has fewer bits; copies are exact. Extra memory: E / G
    rows.
    """
    num_gpus, me = route.held.shape[0], lax.axis_index(axis_name)
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)
    shape = table.shape[1:]
    chunk = -(-math.prod(shape) // num_gpus)
    narrow = jnp.issubdtype(table.dtype, jnp.floating) and table.dtype.itemsize < 4
    wide = jnp.dtype(jnp.float32) if add and narrow else table.dtype

    def send(number: Array, store: Array) -> Array:
        slot = route.send[:, number]
        row = table[slot[me]]  # `NONE` reads the last row, which is dropped below
        row = jnp.pad(row.astype(wide).reshape(-1), (0, num_gpus * chunk - row.size))
        got = lax.all_to_all(row.reshape(num_gpus, chunk), axis_name, 0, 0)
        expert = jnp.where(slot == NONE, num_experts, route.held[gpu, slot])
        if not add:
            return store.at[expert].set(got, mode="drop")

        # One after the other: on a GPU, a scatter to equal indices adds in any order.
        def add_row(i: Array, store: Array) -> Array:
            return store.at[expert[i]].add(got[i], mode="drop")

        return lax.fori_loop(0, num_gpus, add_row, store)

    def receive(number: Array, rows: Array) -> Array:
        slot = route.receive[:, number]
        row = lax.all_to_all(store[route.wanted[gpu, slot]], axis_name, 0, 0).reshape(-1)
        row = row[: math.prod(shape)].reshape(shape).astype(table.dtype)
        mine = jnp.where(slot[me] == NONE, rows.shape[0], slot[me])
        return rows.at[mine].set(row, mode="drop")

    sends, receives = route.rounds
    store = lax.fori_loop(0, sends, send, jnp.zeros((num_experts, chunk), wide))
    return lax.fori_loop(0, receives, receive, table[route.local[me]])


def _ragged(table: Array, source: Int32[Array, "G z"], axis_name: AxisName) -> Array:
    """The rows [z, ...] of this device, each from the slot of any device that `source` names."""
    num_gpus, me = source.shape[0], lax.axis_index(axis_name)
    sender, slot = source // table.shape[0], source % table.shape[0]
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
    # Zero or one row for every slot of every device.
    sends = ((sender == me) & (gpu != me)).astype(jnp.int32).reshape(-1)
    receives = ((sender[me][None] == gpu) & (gpu != me)).astype(jnp.int32).reshape(-1)
    place = jnp.broadcast_to(jnp.arange(source.shape[1], dtype=jnp.int32), source.shape)
    rows = table[jnp.where(sender[me] == me, slot[me], 0)]
    return lax.ragged_all_to_all(
        table, rows, slot.reshape(-1), sends, place.reshape(-1), receives, axis_name=axis_name
    )
