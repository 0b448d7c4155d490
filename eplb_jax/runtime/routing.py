"""From the experts that a router chose to the slots that hold them."""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Key

from eplb_jax.runtime.counting import as_ids, is_expert
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import AxisName, Placement

Choice = Literal["occurrence", "token", "random", "source", "split"]
"""How `to_physical` picks one of an expert's replicas."""

_ONE_OPERAND = 2**31  # tokens x experts below this are sorted in half the time
_NEEDS = {"random": ("key",), "source": ("table", "source"), "split": ("split",)}


def to_physical(
    ids: Int[Array, "... k"],
    layer: Placement,
    choice: Choice = "occurrence",
    *,
    key: Key[Array, ""] | None = None,
    table: Int32[Array, "E G"] | None = None,
    source: int | Int32[Array, ""] | None = None,
    split: Float[Array, " R"] | None = None,
    axis_name: AxisName | None = None,
) -> Int32[Array, "... k"]:
    """The slot that every routed token goes to: the one line between a router and its dispatch.

    After it slots are what experts were: count them, sort by them, and multiply by weights in slot
    order. Whatever else a model makes of the router's ids, such as a load-balancing loss or a
    router's bias, stays with `ids`.

    ============  ==============================================  =============================
    choice        replica                                         evenness
    ============  ==============================================  =============================
    "occurrence"  how often the expert came before in ids,        to a token
                  modulo its replicas; costs a sort of ids
    "token"       number of the token, modulo replicas; costs     less than random
                  nothing
    "random"      drawn with `key`                                random
    "source"      ``table[expert, source]``, see `nearest`;       of GPUs, not of tokens; tokens
                  costs nothing                                   stay near
    "split"       shares of `split`, see `split_load`; costs a    to a token of the shares
                  sort of ids
    ============  ==============================================  =============================

    `benchmarks/runtime.py` measures them token by token. Inside `jax.shard_map` each device counts
    its own tokens; outside, where ids are global, "occurrence" and "split" gather all to sort them.

    Args:
        ids: Logical experts, k of every token. What is negative, or not below E, is padding, and -1
            in the result.
        layer: The plan of this layer, ``plan.layer(i)``. Its maps are arrays: another plan does
            not compile anything anew.
        choice: One of the above.
        key: For "random"; another for every layer and step.
        table: For "source": what `nearest` says of this layer.
        source: For "source": the GPU that these tokens lie on, inside `jax.shard_map` its
            `lax.axis_index`. Given with "occurrence" or "token", replicas are counted from there
            on, so that not every GPU begins with the first.
        split: For "split": the share of every slot in the load of its expert.
        axis_name: For "occurrence" and "split", inside `jax.shard_map`: count tokens over these
            mesh axes, not on every device alone. Costs an all-gather of the counts of E experts.

    Returns:
        Slots, int32, of the shape of ids.

    Raises:
        TypeError: ids are not whole numbers.
        ValueError: The choice is not known or lacks an argument, that has another shape or range,
            ids have no axis of tokens, or the plan is of many layers.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[90, 30, 20, 10]], 6, 1, 1, 3)
        >>> ids = jnp.array([[0, 1], [0, 3], [0, 2], [-1, -1]])
        >>> plan.layer(0).log2phy[0].tolist(), to_physical(ids, plan.layer(0)).tolist()
        ([2, 0, -1], [[2, 4], [0, 3], [2, 5], [-1, -1]])
    """
    if choice not in get_args(Choice):
        known = ", ".join(get_args(Choice))
        raise ValueError(f"choice={choice!r} is not known; choose one of {known}")
    given = {"key": key, "table": table, "source": source, "split": split}
    for name in _NEEDS.get(choice, ()):
        if given[name] is None:
            raise ValueError(f"choice={choice!r} needs {name}=")
    if layer.logcnt.ndim != 1:
        raise ValueError(
            f"layer is a plan of shape {layer.phy2log.shape}; give that of one layer: plan.layer(i)"
        )
    num_experts, num_slots = layer.logcnt.shape[0], layer.phy2log.shape[0]
    if choice == "split" and split is not None and split.shape != (num_slots,):
        raise ValueError(f"split has the shape {split.shape}, but there are {num_slots} slots")
    if choice == "source" and table is not None:
        shape = table.shape
        if len(shape) != 2 or shape[0] != num_experts:
            raise ValueError(f"table has the shape {shape}, not [{num_experts}, GPUs] of a layer")
        if isinstance(source, int) and not 0 <= source < shape[1]:
            raise ValueError(f"source={source} is none of {shape[1]} GPUs; nearest: {shape[1] - 1}")
    layer = Placement(*(jnp.asarray(x) for x in layer))
    ids = as_ids(ids)
    if ids.ndim < 2:
        raise ValueError(f"ids must have the shape [tokens, k], got {ids.shape}")

    slots = partial(_slots, choice=choice, axis_name=axis_name)
    return under_auto(slots, spec_of(ids), ids, layer, given)


@partial(jax.jit, static_argnames=("choice", "axis_name"))
def _slots(
    ids: Int[Array, "... k"],
    layer: Placement,
    given: dict[str, Any],
    *,
    choice: Choice,
    axis_name: AxisName | None,
) -> Int32[Array, "... k"]:
    live = is_expert(ids, layer.logcnt.shape[0])
    ids = jnp.where(live, ids.astype(jnp.int32), -1)
    expert = jnp.maximum(ids, 0)
    if choice == "source":
        slot = given["table"][expert, given["source"]]
    elif choice == "split":
        slot = _shared_out(ids, layer, given["split"], axis_name)
    else:
        count = layer.logcnt[expert]
        if choice == "random":
            drawn = jax.random.uniform(given["key"], ids.shape, jnp.float32)
            drawn = (drawn * count.astype(jnp.float32)).astype(jnp.int32)
            replica = jnp.minimum(drawn, count - 1)
        else:
            tokens = ids.shape[:-1]
            number = jnp.arange(math.prod(tokens), dtype=jnp.int32).reshape(*tokens, 1)
            if choice == "occurrence":
                number = _occurrence(ids, layer.logcnt.shape[0], axis_name)
            replica = (number + (0 if given["source"] is None else given["source"])) % count
        slot = layer.log2phy[expert, replica]
    return jnp.where(live, slot, -1)


class _Sorted(NamedTuple):
    """Routed tokens by expert, padding last."""

    expert: Int32[Array, " n"]
    place: Int32[Array, " n"]
    start: Int32[Array, " E+1"]
    load: Int32[Array, " E+1"]

    def back(self, values: Int32[Array, " n"], shape: tuple[int, ...]) -> Int32[Array, "..."]:
        """Values in the order of the tokens again."""
        return jnp.zeros_like(values).at[self.place].set(values).reshape(shape)


def _sorted(ids: Int[Array, "... k"], num_experts: int) -> _Sorted:
    expert = jnp.where(ids < 0, num_experts, ids).reshape(-1)
    place = jnp.arange(expert.size, dtype=jnp.int32)
    count = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    if expert.size * (num_experts + 1) < _ONE_OPERAND:
        both = jnp.sort(expert * expert.size + place)
        expert = both // max(expert.size, 1)
        place = both - expert * place.size
    else:
        expert, place = lax.sort((expert, place), num_keys=1)
    return _Sorted(expert, place, jnp.cumsum(count, dtype=jnp.int32) - count, count)


def _counts_elsewhere(
    count: Int32[Array, " E"], axis_name: AxisName | None
) -> tuple[Int32[Array, " E"], Int32[Array, " E"]]:
    """Tokens of every expert on the devices before this one, and on all."""
    if axis_name is None:
        return jnp.zeros_like(count), count
    counts = lax.all_gather(count, axis_name)
    before = jnp.arange(counts.shape[0], dtype=jnp.int32) < lax.axis_index(axis_name)
    total = partial(jnp.sum, axis=0, dtype=jnp.int32)
    return total(jnp.where(before[:, None], counts, 0)), total(counts)


def _occurrence(
    ids: Int[Array, "... k"], num_experts: int, axis_name: AxisName | None
) -> Int32[Array, "... k"]:
    """How often the expert of every token came before."""
    order = _sorted(ids, num_experts)
    before, _ = _counts_elsewhere(order.load, axis_name)
    number = jnp.arange(order.place.size, dtype=jnp.int32) - (order.start - before)[order.expert]
    return order.back(number, ids.shape)


def _shared_out(
    ids: Int[Array, "... k"],
    layer: Placement,
    split: Float[Array, " R"],
    axis_name: AxisName | None,
) -> Int32[Array, "... k"]:
    """Slots by shares: of the tokens of an expert, in order, every slot takes a stretch."""
    num_slots = layer.phy2log.shape[0]
    order = _sorted(ids, layer.logcnt.shape[0])
    before, total = _counts_elsewhere(order.load, axis_name)
    listed = layer.log2phy >= 0
    share = jnp.cumsum(jnp.where(listed, split[layer.log2phy], 0), axis=1)
    # The last slot ends where the expert's tokens do, whatever its shares add up to.
    whole = jnp.maximum(jnp.take_along_axis(share, layer.logcnt[:, None] - 1, axis=1), 1e-30)
    ends = jnp.round(share / whole * total[:-1, None].astype(jnp.float32)).astype(jnp.int32)
    replica = jnp.arange(listed.shape[1], dtype=jnp.int32)
    last = replica == layer.logcnt[:, None] - 1
    ends = jnp.where(last, total[:-1, None], ends) - before[:-1, None]
    # In the order of experts and their slots: how many stretches end at or before a token.
    ends = order.start[:-1, None] + jnp.clip(ends, 0, order.load[:-1, None])
    row = jnp.where(listed, ends, order.place.size)
    passed = jnp.zeros(order.place.size, jnp.int32).at[row].add(1, mode="drop")
    # Slots in that same order.
    number = jnp.cumsum(layer.logcnt, dtype=jnp.int32) - layer.logcnt
    row = jnp.where(listed, number[:, None] + replica, num_slots)
    in_order = jnp.zeros(num_slots, jnp.int32).at[row].set(layer.log2phy, mode="drop")
    slot = in_order[jnp.minimum(jnp.cumsum(passed, dtype=jnp.int32), num_slots - 1)]
    return order.back(slot, ids.shape)
