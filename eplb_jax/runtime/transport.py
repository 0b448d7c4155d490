"""Rows of sharded tables from the slots that hold an expert to the slots that want it.

The G devices of a mesh axis hold equal stretches of the slots. Who sends and who fetches is a
matter of small integer maps that every device has, so all agree without a word, and other maps run
in the same executable.

A row travels in two hops. Its sender cuts it into G chunks, one for every device; each device then
hands its chunk to all that want the row. A round of either hop is one all-to-all of one row from
every device, whether it has one to send or not and whichever pairs of devices the rows go between;
there are as many rounds as the busiest device has rows to send, or to fetch, and none where nothing
moves. An expert that goes to many devices is sent once. Chunks of replicas can be added up on the
way, once and for all replicas alike, which leaves these equal bit for bit.

Where XLA has a ragged all-to-all, on GPUs and TPUs, copies can go in one hop instead, from the very
slots that `eplb_jax.moves` names.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int32

from eplb_jax.planning.placement import count_replicas, first_positions
from eplb_jax.types import AxisName

NONE = -1


@partial(jax.jit, static_argnames=("num_experts", "mesh", "axis_name", "specs", "add"))
def transported(
    leaves: Sequence[Array],
    held: Int32[Array, "*L S"],
    wanted: Int32[Array, "*L Z"],
    changes: Bool[Array, "*L"],
    source: Int32[Array, "*L Z"] | None = None,
    *,
    num_experts: int,
    mesh: Mesh,
    axis_name: AxisName,
    specs: tuple[PartitionSpec, ...],
    add: bool = False,
) -> list[Array]:
    """Tables [*L, Z, ...] of the rows that are wanted, of tables [*L, S, ...] of those held.

    One layer after the other, each replaced in place where S = Z. `transport` has the rest.

    Args:
        leaves: Tables of one S; the slots lie over `axis_name`.
        held: The expert of every row.
        wanted: The expert of every row to come.
        changes: Layers without change are not touched; if S and Z differ, all must be True.
        source: Where given, the row that every row wanted is a copy of, by a ragged all-to-all.
        num_experts: E.
        mesh: Where the tables lie.
        axis_name: Its axes over which rows lie.
        specs: How every leaf lies there, before and after.
        add: Every row wanted is the sum of all rows of its expert, not a copy of one.
    """
    num_gpus = axis_size(mesh, axis_name)
    route_of = route_of_sums if add else route_of_copies
    single = held.ndim == 1

    def on_device(
        leaves: Sequence[Array], held: Array, wanted: Array, changes: Array, source: Array | None
    ) -> list[Array]:
        if single:
            leaves, held, wanted, changes, source = jax.tree.map(
                lambda x: x[None], (leaves, held, wanted, changes, source)
            )
        layers = jnp.argsort(~changes, stable=True)
        size = wanted.shape[1] // num_gpus
        in_place = held.shape == wanted.shape
        fresh = [jnp.zeros((x.shape[0], size, *x.shape[2:]), x.dtype) for x in leaves]

        def one_layer(number: Array, rows: list[Array]) -> list[Array]:
            layer = layers[number]
            tables = [x[layer] for x in (rows if in_place else leaves)]
            if source is not None:
                tables = [_sent(x, source[layer].reshape(num_gpus, -1), axis_name) for x in tables]
            else:
                route = route_of(held[layer], wanted[layer], num_experts, num_gpus)
                tables = [_carried(x, route, num_experts, axis_name, add=add) for x in tables]
            return [x.at[layer].set(y) for x, y in zip(rows, tables, strict=True)]

        count = jnp.sum(changes, dtype=jnp.int32)
        rows = lax.fori_loop(0, count, one_layer, list(leaves) if in_place else fresh)
        return [x[0] for x in rows] if single else rows

    maps = (PartitionSpec(),) * 4
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(list(specs), *maps), out_specs=list(specs), check_vma=False
    )(list(leaves), held, wanted, changes, source)


def axis_size(mesh: Mesh, axis_name: AxisName) -> int:
    """How many devices the axes have together."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    return math.prod(mesh.shape[name] for name in names)


class Route(NamedTuple):
    """Which rows every device keeps, sends and fetches; lists are padded with `NONE`.

    Attributes:
        held: The expert in every slot that rows come from.
        wanted: The expert in every slot that rows go to.
        local: For every slot that rows go to, the slot of its device to take the row from.
        send: The slots of every device whose rows it sends, round by round.
        fetch: The slots of every device whose rows it fetches, round by round.
    """

    held: Int32[Array, "G s"]
    wanted: Int32[Array, "G z"]
    local: Int32[Array, "G z"]
    send: Int32[Array, "G s"]
    fetch: Int32[Array, "G z"]

    @property
    def rounds(self) -> tuple[Array, Array]:
        """How many rounds of sending and of fetching there are, int32."""
        sends, fetches = (
            jnp.sum(x != NONE, axis=1, dtype=jnp.int32) for x in (self.send, self.fetch)
        )
        return jnp.max(sends), jnp.max(fetches)


def route_of_copies(
    held: Int32[Array, " S"], wanted: Int32[Array, " Z"], num_experts: int, num_gpus: int
) -> Route:
    """Every slot of `wanted` gets a copy, from its own device where that holds the expert.

    Of an expert that others want one device sends one row; where several could, they take turns.
    """
    held_by, wanted_by = held.reshape(num_gpus, -1), wanted.reshape(num_gpus, -1)
    size, at = held_by.shape[1], first_positions(held, num_experts, num_gpus)
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
    local = at[wanted_by, gpu]
    if held_by.shape == wanted_by.shape:
        local = jnp.where(held_by == wanted_by, jnp.arange(size, dtype=jnp.int32), local)
    fetched = local == size
    asked = jnp.zeros(num_experts, bool).at[wanted_by].max(fetched)
    turn = jnp.cumsum(asked, dtype=jnp.int32) - 1
    holders = jnp.cumsum(at < size, axis=1, dtype=jnp.int32)
    due = turn % jnp.maximum(holders[:, -1], 1) + 1
    sender = (at < size) & (holders == due[:, None]) & asked[:, None]
    sends = sender[held_by, gpu] & (at[held_by, gpu] == jnp.arange(size, dtype=jnp.int32))
    local = jnp.where(fetched, NONE, local)
    return Route(held_by, wanted_by, local, _listed(sends), _listed(fetched))


def route_of_sums(
    held: Int32[Array, " S"], wanted: Int32[Array, " Z"], num_experts: int, num_gpus: int
) -> Route:
    """Every slot of `wanted` gets the sum over the slots that hold its expert.

    Experts of one slot that is where it should be stay out of it.
    """
    route = route_of_copies(held, wanted, num_experts, num_gpus)
    moving = (count_replicas(held, num_experts) > 1) | jnp.zeros(num_experts, bool).at[route.wanted].max(
        route.local == NONE
    )
    sends, fetches = moving[route.held], moving[route.wanted]
    return route._replace(
        local=jnp.where(fetches, NONE, route.local), send=_listed(sends), fetch=_listed(fetches)
    )


def _listed(chosen: Bool[Array, "G s"]) -> Int32[Array, "G s"]:
    """The places of every row that are chosen, in order, then `NONE`."""
    places = jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)
    return jnp.where(jnp.take_along_axis(chosen, places, axis=1), places, NONE)


def _carried(
    table: Array, route: Route, num_experts: int, axis_name: AxisName, *, add: bool = False
) -> Array:
    """The rows [z, ...] of this device after the route, of its rows [s, ...].

    Args:
        table: This device's rows.
        route: Of all devices, the same on each.
        num_experts: E.
        axis_name: The mesh axes over which the slots lie.
        add: Rows of an expert are added up, as a route of sums wants, in float32 where they are of
            fewer bits. Else one is copied, bit for bit.

    Returns:
        Rows in the dtype of the table. Extra memory: E / G rows.
    """
    num_gpus, me = route.held.shape[0], lax.axis_index(axis_name)
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)
    shape = table.shape[1:]
    chunk = -(-math.prod(shape) // num_gpus)
    narrow = jnp.issubdtype(table.dtype, jnp.floating) and table.dtype.itemsize < 4
    wide = jnp.dtype(jnp.float32) if add and narrow else table.dtype

    def spread(number: Array, store: Array) -> Array:
        slot = route.send[:, number]
        row = table[slot[me]]  # the last where there is none, as `NONE` indexes it
        row = jnp.pad(row.astype(wide).reshape(-1), (0, num_gpus * chunk - row.size))
        got = lax.all_to_all(row.reshape(num_gpus, chunk), axis_name, 0, 0)
        sent = jnp.where(slot == NONE, num_experts, route.held[gpu, slot])
        if not add:
            return store.at[sent].set(got, mode="drop")
        # One after the other: a scatter of equal indices adds in any order on a GPU.
        one = lambda i, store: store.at[sent[i]].add(got[i], mode="drop")  # noqa: E731
        return lax.fori_loop(0, num_gpus, one, store)

    def deliver(number: Array, rows: Array) -> Array:
        slot = route.fetch[:, number]
        row = lax.all_to_all(store[route.wanted[gpu, slot]], axis_name, 0, 0).reshape(-1)
        row = row[: math.prod(shape)].reshape(shape).astype(table.dtype)
        mine = jnp.where(slot[me] == NONE, rows.shape[0], slot[me])
        return rows.at[mine].set(row, mode="drop")

    sends, fetches = route.rounds
    store = lax.fori_loop(0, sends, spread, jnp.zeros((num_experts, chunk), wide))
    rows = table[route.local[me]]
    return lax.fori_loop(0, fetches, deliver, rows)


def _sent(table: Array, source: Int32[Array, "G z"], axis_name: AxisName) -> Array:
    """The rows [z, ...] of this device, each from the slot of any device that `source` names."""
    num_gpus, me = source.shape[0], lax.axis_index(axis_name)
    sender, slot = source // table.shape[0], source % table.shape[0]
    gpu = jnp.arange(num_gpus, dtype=jnp.int32)[:, None]
    # A stretch of no or one row for every slot of every device.
    sends = ((sender == me) & (gpu != me)).astype(jnp.int32).reshape(-1)
    receives = ((sender[me] == gpu) & (gpu != me)).astype(jnp.int32).reshape(-1)
    place = jnp.broadcast_to(jnp.arange(source.shape[1], dtype=jnp.int32), source.shape)
    rows = table[jnp.where(sender[me] == me, slot[me], 0)]
    return lax.ragged_all_to_all(
        table, rows, slot.reshape(-1), sends, place.reshape(-1), receives, axis_name=axis_name
    )
