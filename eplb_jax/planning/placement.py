"""The maps of a plan: made from replicas or from a foreign map, inverted, and checked."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from eplb_jax.checks import LoadLike, as_experts, check_complete, is_concrete
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement, Replication

_FEW_SLOTS = 512
"""Number of slots up to which comparing all of them is faster than sorting them."""


@by_layers
@jax.jit
def place(replicas: Replication) -> Placement:
    """The plan whose slots hold these replicas."""
    num_slots, num_experts = replicas.phy2log.shape[-1], replicas.logcnt.shape[-1]
    empty = jnp.full((num_experts, num_slots - num_experts + 1), -1, jnp.int32)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    with jax.named_scope("maps"):

        def invert_layer(expert: Array, rank: Array) -> Array:
            expert = jnp.where(expert < 0, num_experts, expert)  # in no slot
            return empty.at[expert, rank].set(slot, mode="drop")

        invert = jnp.vectorize(invert_layer, signature="(r),(r)->(e,x)")
        return Placement(replicas.phy2log, invert(*replicas[:2]), replicas.logcnt)


def count_replicas(phy2log: Int32[Array, "*L R"], num_experts: int) -> Int32[Array, "*L E"]:
    """How many replicas every expert has; -1 and numbers past the last expert are not counted."""
    empty = jnp.zeros(num_experts, jnp.int32)
    phy2log = jnp.where(phy2log < 0, num_experts, phy2log)
    count = jnp.vectorize(lambda x: empty.at[x].add(1, mode="drop"), signature="(r)->(e)")
    return count(phy2log)


def first_positions(
    phy2log: Int32[Array, " R"], num_experts: int, num_gpus: int
) -> Int32[Array, "E G"]:
    """The first slot of every GPU that holds an expert, counted on that GPU; R / G if none does."""
    slot = jnp.arange(phy2log.size, dtype=jnp.int32)
    size = phy2log.size // num_gpus
    none = jnp.full((num_experts, num_gpus), size, jnp.int32)
    expert = jnp.where(phy2log < 0, num_experts, phy2log)  # in no slot
    return none.at[expert, slot // size].min(slot % size, mode="drop")


def ranks_in(phy2log: Int32[Array, "*L R"]) -> Int32[Array, "*L R"]:
    """The rank of every replica among those of its expert, in the order of their slots."""
    slot = lax.broadcasted_iota(jnp.int32, phy2log.shape, phy2log.ndim - 1)
    if phy2log.shape[-1] <= _FEW_SLOTS:
        same = phy2log[..., :, None] == phy2log[..., None, :]
        earlier = slot[..., :, None] > slot[..., None, :]
        return jnp.sum(same & earlier, axis=-1, dtype=jnp.int32)
    expert, order = lax.sort((phy2log, slot), num_keys=2)
    first = jnp.concatenate([jnp.full_like(expert[..., :1], -2), expert[..., :-1]], axis=-1)
    start = lax.cummax(jnp.where(expert != first, slot, 0), axis=phy2log.ndim - 1)
    return lax.sort((order, slot - start), num_keys=1)[1]


def ranks_listed(plan: Placement) -> Int32[Array, "*L R"]:
    """The rank of every replica, in the order in which `log2phy` lists them."""
    listed = jnp.take_along_axis(plan.log2phy, plan.phy2log[..., None], axis=-2)
    slot = lax.broadcasted_iota(jnp.int32, listed.shape, listed.ndim - 2)
    return jnp.argmax(listed == slot, axis=-1).astype(jnp.int32)


def placement_of(phy2log: LoadLike, num_experts: int | None = None) -> Placement:
    """A plan from a map of another system: the expert in every slot.

    The replicas of an expert are ranked in the order of their slots.

    Args:
        phy2log: The expert in every slot, [L, R] or [R]; anything `jnp.asarray` takes.
        num_experts: E; None: the largest expert of a concrete map, plus 1.

    Raises:
        TypeError: It does not hold integers.
        ValueError: A concrete map has no slot for an expert, or a number that is no expert.

    Example:
        >>> placement_of([[0, 1, 0, 2]]).log2phy.tolist()
        [[[0, 2], [1, -1], [3, -1]]]
    """
    return as_placement(phy2log, "phy2log", num_experts)


def as_placement(value: Any, name: str, num_experts: int | None = None) -> Placement:
    """A plan, or a foreign map as one, checked where it is concrete.

    Raises:
        TypeError: It is neither.
        ValueError: It lacks an expert, or its maps do not agree.
    """
    if isinstance(value, Placement):
        if all(is_concrete(x) for x in value):
            try:
                check_placement(value)
            except ValueError as error:
                raise ValueError(f"{name} is an invalid plan: {error}") from None
        return value
    experts = as_experts(value, name, num_experts=num_experts)
    if num_experts is None:
        if not is_concrete(experts):
            raise TypeError(f"{name} is a traced map; give a Placement, see placement_of")
        num_experts = int(np.asarray(experts).max(initial=0)) + 1
    check_complete(experts, num_experts, name)
    return invert_map(experts, num_experts=num_experts)


@by_layers
@partial(jax.jit, static_argnames="num_experts")
def invert_map(phy2log: Int32[Array, "*L R"], *, num_experts: int) -> Placement:
    """The plan of a map, which may lack experts."""
    count = count_replicas(phy2log, num_experts)
    return place(Replication(phy2log, ranks_in(phy2log), count))


def check_placement(placement: Placement) -> None:
    """Raise ValueError unless every expert has a slot and the three maps agree.

    Args:
        placement: A plan of L layers, or of one.
    """
    phy2log, log2phy, logcnt = (np.asarray(x) for x in placement)
    if logcnt.ndim == 1:
        phy2log, log2phy, logcnt = phy2log[None], log2phy[None], logcnt[None]
    num_slots, num_experts = phy2log.shape[1], logcnt.shape[1]

    def require(valid: np.ndarray, message: str) -> None:
        """Raise for the first layer that is not valid."""
        for layer in np.flatnonzero(~valid)[:1]:
            raise ValueError(message.format(layer=layer))

    known = (phy2log >= -1) & (phy2log < num_experts)
    message = f"names an expert outside 0..{num_experts - 1}"
    require(known.all(axis=1), f"phy2log of layer {{layer}} {message}")
    layer = np.arange(len(phy2log))[:, None]
    held = phy2log >= 0
    count = np.bincount((layer * num_experts + phy2log)[held], minlength=logcnt.size)
    count = count.reshape(logcnt.shape)
    equal = (count == logcnt).all(axis=1)
    require(equal, "logcnt of layer {layer} does not count the replicas in phy2log")
    for i, expert in np.argwhere(count == 0)[:1]:
        raise ValueError(f"layer {i} has no slot for expert {expert}")
    listed = log2phy >= 0
    equal = (listed == (np.arange(log2phy.shape[2]) < count[:, :, None])).all(axis=(1, 2))
    require(equal, "log2phy of layer {layer} lists another number of slots than logcnt")
    # Every expert lists as many slots as it has: each slot must come once, and be of its expert.
    i, expert, _ = np.nonzero(listed)
    slot = log2phy[listed]
    known = slot < num_slots
    listing = np.full((len(phy2log), num_slots), -1)
    listing[i[known], slot[known]] = expert[known]
    inverse = listing == phy2log
    require(inverse.all(axis=1), "log2phy of layer {layer} is not the inverse of phy2log")


@jax.jit
def is_valid(plan: Placement) -> Bool[Array, "*L"]:
    """What `check_placement` checks, layer by layer, of a traced plan."""
    num_slots, most = plan.phy2log.shape[-1], plan.log2phy.shape[-1]

    def of_layer(phy2log: Array, log2phy: Array, logcnt: Array) -> Array:
        expert = jnp.arange(logcnt.shape[0], dtype=jnp.int32)
        known = (phy2log >= -1) & (phy2log < expert.size)
        count = count_replicas(jnp.where(known, phy2log, expert.size), expert.size)
        listed = jnp.arange(most, dtype=jnp.int32)[None] < logcnt[:, None]
        right = (log2phy >= 0) == listed
        right &= ~listed | (phy2log[log2phy] == expert[:, None])
        times = count_replicas(jnp.where(listed, log2phy, num_slots).reshape(-1), num_slots)
        fits = jnp.all(known) & jnp.all(count > 0) & jnp.all(count == logcnt)
        return fits & jnp.all(right) & jnp.all(times == (phy2log >= 0).astype(jnp.int32))

    return of_layer(*plan) if plan.logcnt.ndim == 1 else jax.vmap(of_layer)(*plan)
