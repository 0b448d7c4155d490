"""Slots for the experts that a router has chosen."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Integer, Key

from eplb_jax.checks import LoadLike
from eplb_jax.planning.placement import as_placement
from eplb_jax.runtime.counting import as_ids, is_expert
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import AxisName, Placement

Choice = Literal["round_robin", "token", "random", "nearest", "shares"]
"""The rule by which `to_physical` chooses a replica."""

_ONE_OPERAND = 2**31  # tokens x experts below this are sorted in half the time
_NEEDS = {"random": ("key",), "nearest": ("table", "gpu"), "shares": ("shares",)}


def to_physical(
    ids: Integer[Array, "... k"],
    layer: Placement | LoadLike,
    choice: Choice = "round_robin",
    *,
    key: Key[Array, ""] | None = None,
    table: Int32[Array, "E G"] | None = None,
    gpu: int | Int32[Array, ""] | None = None,
    shares: Float[Array, " R"] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, "... k"]:
    """The slot of every routed token: the one line between a router and its dispatch.

    Use the slots in place of experts: count them, sort by them, and multiply by weights in slot
    order. Everything else that a model computes from ids, such as a load-balancing loss or the bias
    of a router, stays with ids.

    =============  ==================================================  =========================
    choice         replica                                             tokens of the replicas
    =============  ==================================================  =========================
    "round_robin"  in turn, over the tokens of the expert; sorts ids   equal, to one token
    "token"        number of the token modulo replicas; no sort        equal on average
    "random"       drawn with `key`                                    equal on average
    "nearest"      ``table[expert, gpu]`` of `nearest_replica`         by the GPUs they come from
    "shares"       by shares of `split_load`; sorts ids                the shares, to one token
    =============  ==================================================  =========================

    Inside `jax.shard_map` each device counts its own tokens; outside, where ids are global,
    "round_robin" and "shares" gather all of them for the sort.

    Args:
        ids: Logical experts, k of every token. Ids that are negative, or not below E, are padding,
            and -1 in the result.
        layer: The plan of this layer, ``plan.layer(i)``, or its phy2log [R]. A new plan compiles
            nothing. A `Placement` is not checked.
        choice: One of the above.
        key: For "random"; another one for every layer and step.
        table: For "nearest": the table of `nearest_replica` for this layer.
        gpu: For "nearest": the GPU of these tokens, inside `jax.shard_map` its `lax.axis_index`.
            With "round_robin" and "token", the replica to begin with, so that GPUs do not all begin
            with the first.
        shares: For "shares": the share of every slot in the load of its expert. They are divided by
            their sum; where it is 0, all tokens go to the last slot of the expert.
        axis_name: For "round_robin" and "shares", inside `jax.shard_map`: number tokens over these
            mesh axes, not on every device alone. Costs an all-gather of the counts of E experts.

    Returns:
        Slots, int32, of the shape of ids.

    Raises:
        TypeError: ids are not integers.
        ValueError: The choice is not known or lacks an argument, an argument has another shape or
            range, ids have no axis of tokens, or the plan has several layers.

    Example:
        >>> ids = jnp.array([[0, 1], [0, 2], [0, 1], [-1, -1]])
        >>> to_physical(ids, [0, 1, 2, 0]).tolist()
        [[0, 1], [3, 2], [0, 1], [-1, -1]]
    """
    if choice not in get_args(Choice):
        known = ", ".join(get_args(Choice))
        raise ValueError(f"choice={choice!r} is not known; choose one of {known}")
    given = {"key": key, "table": table, "gpu": gpu, "shares": shares}
    for name in _NEEDS.get(choice, ()):
        if given[name] is None:
            raise ValueError(f"choice={choice!r} needs {name}=")
    layer = layer if isinstance(layer, Placement) else as_placement(layer, "layer")
    if layer.logcnt.ndim != 1:
        raise ValueError(
            f"layer is a plan of shape {layer.phy2log.shape}; give that of one layer: plan.layer(i)"
        )
    num_experts, num_slots = layer.logcnt.shape[0], layer.phy2log.shape[0]
    if choice == "shares" and shares is not None and shares.shape != (num_slots,):
        raise ValueError(f"shares has the shape {shares.shape}, but there are {num_slots} slots")
    if choice == "nearest" and table is not None:
        if table.ndim != 2 or table.shape[0] != num_experts:
            raise ValueError(
                f"table has the shape {table.shape}, not [{num_experts}, GPUs] of a layer"
            )
        last = table.shape[1] - 1
        if isinstance(gpu, int) and not 0 <= gpu <= last:
            raise ValueError(f"gpu={gpu} is not one of {last + 1} GPUs; nearest: {last}")
    ids = as_ids(ids)
    if ids.ndim < 2:
        raise ValueError(f"ids must have the shape [tokens, k], got {ids.shape}")
    layer = Placement(*(jnp.asarray(x) for x in layer))
    slots = partial(_slots, choice=choice, axis_name=axis_name)
    return under_auto(slots, spec_of(ids), ids, layer, given)


@partial(jax.jit, static_argnames=("choice", "axis_name"))
def _slots(
    ids: Integer[Array, "... k"],
    layer: Placement,
    given: dict[str, Any],
    *,
    choice: Choice,
    axis_name: AxisName | None,
) -> Int32[Array, "... k"]:
    live = is_expert(ids, layer.logcnt.shape[0])
    ids = jnp.where(live, ids.astype(jnp.int32), -1)
    expert = jnp.maximum(ids, 0)
    if choice == "nearest":
        slot = given["table"][expert, given["gpu"]]
    elif choice == "shares":
        slot = _by_shares(ids, layer, given["shares"], axis_name)
    else:
        count = layer.logcnt[expert]
        if choice == "random":
            drawn = jax.random.uniform(given["key"], ids.shape, jnp.float32)
            drawn = (drawn * count.astype(jnp.float32)).astype(jnp.int32)
            replica = jnp.minimum(drawn, count - 1)
        else:
            if choice == "round_robin":
                number = _numbers(ids, layer.logcnt.shape[0], axis_name)
            else:
                tokens = ids.shape[:-1]
                number = jnp.arange(math.prod(tokens), dtype=jnp.int32).reshape(*tokens, 1)
            replica = (number + (0 if given["gpu"] is None else given["gpu"])) % count
        slot = layer.log2phy[expert, replica]
    return jnp.where(live, slot, -1)


class _Order(NamedTuple):
    """Routed tokens sorted by expert, padding last."""

    expert: Int32[Array, " n"]
    place: Int32[Array, " n"]
    start: Int32[Array, " E+1"]
    load: Int32[Array, " E+1"]

    def restore(self, values: Int32[Array, " n"], shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """Sorted values in the order of the tokens."""
        return jnp.zeros_like(values).at[self.place].set(values).reshape(shape)


def _sort(ids: Integer[Array, "... k"], num_experts: int) -> _Order:
    expert = jnp.where(ids < 0, num_experts, ids).reshape(-1)
    place = jnp.arange(expert.size, dtype=jnp.int32)
    count = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    if expert.size * (num_experts + 1) < _ONE_OPERAND:
        both = jnp.sort(expert * expert.size + place)
        expert = both // max(expert.size, 1)
        place = both - expert * place.size
    else:
        expert, place = lax.sort((expert, place), num_keys=1)
    return _Order(expert, place, jnp.cumsum(count, dtype=jnp.int32) - count, count)


def _counts_over(
    count: Int32[Array, " E"], axis_name: AxisName | None
) -> tuple[Int32[Array, " E"], Int32[Array, " E"]]:
    """Tokens of every expert on the devices before this one, and on all devices."""
    if axis_name is None:
        return jnp.zeros_like(count), count
    counts = lax.all_gather(count, axis_name)
    before = jnp.arange(counts.shape[0], dtype=jnp.int32) < lax.axis_index(axis_name)
    total = partial(jnp.sum, axis=0, dtype=jnp.int32)
    return total(jnp.where(before[:, None], counts, 0)), total(counts)


def _numbers(
    ids: Integer[Array, "... k"], num_experts: int, axis_name: AxisName | None
) -> Int32[Array, "... k"]:
    """The number of every token among those of its expert."""
    order = _sort(ids, num_experts)
    before, _ = _counts_over(order.load, axis_name)
    number = jnp.arange(order.place.size, dtype=jnp.int32) - (order.start - before)[order.expert]
    return order.restore(number, ids.shape)


def _by_shares(
    ids: Integer[Array, "... k"],
    layer: Placement,
    shares: Float[Array, " R"],
    axis_name: AxisName | None,
) -> Int32[Array, "... k"]:
    """Every slot takes a range of the tokens of its expert, in order."""
    num_slots = layer.phy2log.shape[0]
    order = _sort(ids, layer.logcnt.shape[0])
    before, total = _counts_over(order.load, axis_name)
    listed = layer.log2phy >= 0
    share = jnp.cumsum(jnp.where(listed, shares[layer.log2phy], 0), axis=1)
    # Ranges end at rounded cumulative shares; the last at the last token of the expert.
    whole = jnp.maximum(jnp.take_along_axis(share, layer.logcnt[:, None] - 1, axis=1), 1e-30)
    ends = jnp.round(share / whole * total[:-1, None].astype(jnp.float32)).astype(jnp.int32)
    replica = jnp.arange(listed.shape[1], dtype=jnp.int32)[None]
    last = replica == layer.logcnt[:, None] - 1
    ends = jnp.where(last, total[:-1, None], ends) - before[:-1, None]
    # In the order of experts and their slots: the number of ranges that end at or before a token.
    ends = order.start[:-1, None] + jnp.clip(ends, 0, order.load[:-1, None])
    row = jnp.where(listed, ends, order.place.size)
    passed = jnp.zeros(order.place.size, jnp.int32).at[row].add(1, mode="drop")
    # Slots in that same order.
    number = jnp.cumsum(layer.logcnt, dtype=jnp.int32) - layer.logcnt
    row = jnp.where(listed, number[:, None] + replica, num_slots)
    in_order = jnp.zeros(num_slots, jnp.int32).at[row].set(layer.log2phy, mode="drop")
    slot = in_order[jnp.minimum(jnp.cumsum(passed, dtype=jnp.int32), num_slots - 1)]
    return order.restore(slot, ids.shape)
