"""The maps of a plan, their inverses, and whether they fit together."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement, Replication
from eplb_jax.validation import can_be_seen


@by_layers
@jax.jit
def place(replicas: Replication) -> Placement:
    """The plan whose slots hold these replicas."""
    phy2log, rank, logcnt = replicas
    num_slots, num_experts = phy2log.shape[1], logcnt.shape[1]
    most = num_slots - num_experts + 1
    slot = jnp.arange(num_slots, dtype=jnp.int32)

    def slots(expert: Int32[Array, " R"], rank: Int32[Array, " R"]) -> Int32[Array, "E X"]:
        return jnp.full((num_experts, most), -1, jnp.int32).at[expert, rank].set(slot)

    with jax.named_scope("maps"):
        return Placement(phy2log, jax.vmap(slots)(phy2log, rank), logcnt)


def counted(phy2log: Int32[Array, "*L R"], num_experts: int) -> Int32[Array, "*L E"]:
    """How many replicas every expert has; numbers past the last count for nothing."""
    empty = jnp.zeros(num_experts, jnp.int32)
    count = lambda x: empty.at[x].add(1, mode="drop")  # noqa: E731
    return jnp.vectorize(count, signature="(r)->(e)")(phy2log)


def places(phy2log: Int32[Array, " R"], num_experts: int, num_gpus: int) -> Int32[Array, "E G"]:
    """The first slot of every GPU that holds an expert, from its first on; R / G without one."""
    slot = jnp.arange(phy2log.size, dtype=jnp.int32)
    size = phy2log.size // num_gpus
    none = jnp.full((num_experts, num_gpus), size, jnp.int32)
    return none.at[phy2log, slot // size].min(slot % size)


def ranks_in(phy2log: Int32[Array, "L R"]) -> Int32[Array, "L R"]:
    """The rank of every replica among those of its expert, in the order of their slots."""
    earlier = np.tri(phy2log.shape[1], k=-1, dtype=bool)
    rank = lambda x: jnp.sum((x[:, None] == x) & earlier, axis=1, dtype=jnp.int32)  # noqa: E731
    return jax.vmap(rank)(phy2log)


def ranks_listed(log2phy: Int32[Array, "L E X"], phy2log: Int32[Array, "L R"]) -> Array:
    """The rank of every replica, int32 [L, R], in the order in which `log2phy` lists them."""
    slot = jnp.arange(phy2log.shape[1], dtype=jnp.int32)

    def rank(listed: Int32[Array, "E X"], expert: Int32[Array, " R"]) -> Int32[Array, " R"]:
        return jnp.argmax(listed[expert] == slot[:, None], axis=1).astype(jnp.int32)

    return jax.vmap(rank)(log2phy, phy2log)


def check_placement(placement: Placement) -> None:
    """Raise ValueError unless every expert has a slot and the three maps say the same."""
    phy2log, log2phy, logcnt = (np.asarray(x) for x in placement)
    num_layers, num_slots = phy2log.shape
    num_experts = logcnt.shape[1]
    for layer in range(num_layers):
        experts = phy2log[layer]
        if not np.all((experts >= 0) & (experts < num_experts)):
            raise ValueError(
                f"phy2log of layer {layer} names an expert outside 0..{num_experts - 1}"
            )
        count = np.bincount(experts, minlength=num_experts)
        if not np.array_equal(count, logcnt[layer]):
            raise ValueError(f"logcnt of layer {layer} does not count the replicas in phy2log")
        if not np.all(count):
            raise ValueError(f"layer {layer} has no slot for expert {int(np.argmin(count))}")
        listed = log2phy[layer]
        if not np.array_equal(listed >= 0, np.arange(listed.shape[1]) < count[:, None]):
            raise ValueError(f"log2phy of layer {layer} lists another number of slots than logcnt")
        expert, column = np.nonzero(listed >= 0)
        slots = listed[expert, column]
        whole = np.unique(slots).size == num_slots and slots.max() < num_slots
        if not whole or not np.array_equal(experts[slots], expert):
            raise ValueError(f"log2phy of layer {layer} is not the inverse of phy2log")


def check_plan(plan: Placement, name: str) -> None:
    """Raise TypeError or ValueError unless it is a plan, of many layers or one, if it is seen."""
    if not isinstance(plan, Placement):
        raise TypeError(f"{name} must be a Placement, of rebalance_experts, got {plan!r}")
    if not all(can_be_seen(x) for x in plan):
        return
    try:
        check_placement(plan if plan.logcnt.ndim > 1 else Placement(*(x[None] for x in plan)))
    except ValueError as error:
        raise ValueError(f"{name} is no plan: {error}") from None


@jax.jit
def is_plan(plan: Placement) -> Bool[Array, "*L"]:
    """What `check_placement` checks, layer by layer, of values that cannot be seen."""
    num_slots, most = plan.phy2log.shape[-1], plan.log2phy.shape[-1]

    def of_layer(phy2log: Array, log2phy: Array, logcnt: Array) -> Array:
        expert = jnp.arange(logcnt.shape[0], dtype=jnp.int32)
        known = (phy2log >= 0) & (phy2log < expert.size)
        count = counted(jnp.where(known, phy2log, expert.size), expert.size)
        listed = jnp.arange(most, dtype=jnp.int32) < logcnt[:, None]
        right = (log2phy >= 0) == listed
        right &= ~listed | (phy2log[log2phy] == expert[:, None])
        times = counted(jnp.where(listed, log2phy, num_slots).reshape(-1), num_slots)
        fits = jnp.all(known) & jnp.all(count > 0) & jnp.all(count == logcnt)
        return fits & jnp.all(right) & jnp.all(times == 1)

    return of_layer(*plan) if plan.logcnt.ndim == 1 else jax.vmap(of_layer)(*plan)
