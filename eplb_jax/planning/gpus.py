"""GPUs that come, go and differ: which are alive, how fast they are, and what they hold."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.checks import as_count, as_experts, is_concrete
from eplb_jax.types import Topology


class Gpus(NamedTuple):
    """What changes while serving: which GPUs are alive, and how fast they are; None: all, equally.

    Attributes:
        active: Whether a GPU is alive.
        speed: Tokens per second of every GPU, in any unit.
    """

    active: Bool[Array, " G"] | None = None
    speed: Float[Array, " G"] | None = None


def align(
    previous: Any,
    topology: Topology,
    num_layers: int,
    num_experts: int,
    previous_gpus: Sequence[int] | None,
) -> Int32[Array, "L R"]:
    """The map in place on the GPUs of a topology: -1 in slots of GPUs that were not there.

    Raises:
        TypeError: The map does not hold integers, or a GPU is not one.
        ValueError: Its layers are others, its width is not that of whole GPUs, a number is no
            expert, or previous_gpus has another length or names a GPU twice or none that was there.
    """
    old = as_experts(previous, "previous", num_experts=num_experts)
    if old.ndim != 2 or len(old) != num_layers:
        raise ValueError(f"previous must have {num_layers} layers, got the shape {old.shape}")
    width = old.shape[1]
    if width == topology.num_replicas and previous_gpus is None:
        return old
    slots = topology.slots_per_gpu
    if width % slots:
        below, above = width // slots * slots, -(-width // slots) * slots
        raise ValueError(
            f"previous has {width} slots, which are no GPUs of {slots} slots; "
            f"nearest: {below}, {above}"
        )
    before = width // slots
    if previous_gpus is None:
        source = [g if g < before else -1 for g in range(topology.num_gpus)]
    else:
        source = [as_count("previous_gpus", g, least=-1) for g in previous_gpus]
        named = [g for g in source if g >= 0]
        if len(source) != topology.num_gpus:
            raise ValueError(
                f"previous_gpus has {len(source)} numbers for {topology.num_gpus} GPUs; "
                "give the old GPU of each, -1 for one that was not there"
            )
        if len(set(named)) < len(named) or max(named, default=0) >= before:
            raise ValueError(
                f"previous_gpus={source} must be distinct numbers below {before}, the number of "
                "GPUs of previous, or -1"
            )
    by_gpu = old.reshape(num_layers, before, slots)
    none = jnp.full((num_layers, 1, slots), -1, jnp.int32)
    by_gpu = jnp.concatenate([by_gpu, none], axis=1)
    return by_gpu[:, jnp.asarray(source)].reshape(num_layers, topology.num_replicas)


def as_active(active: Any, topology: Topology, num_experts: int) -> Bool[Array, " G"] | None:
    """The mask of live GPUs, checked where it is concrete.

    Raises:
        ValueError: It is not one truth value for each GPU, or live GPUs have too few slots.
    """
    if active is None:
        return None
    mask = active if isinstance(active, jax.Array) else jnp.asarray(np.asarray(active))
    if mask.shape != (topology.num_gpus,):
        raise ValueError(f"active must have the shape ({topology.num_gpus},), got {mask.shape}")
    if is_concrete(mask):
        live = np.asarray(mask) != 0
        slots = int(np.array(topology.slots_of_gpu)[live].sum())
        if slots < num_experts:
            raise ValueError(
                f"active leaves {int(live.sum())} of {topology.num_gpus} GPUs with {slots} slots "
                f"for {num_experts} experts; {num_experts - slots} slots are missing"
            )
    return mask.astype(bool)


def as_speed(speed: Any, topology: Topology) -> Float[Array, " G"] | None:
    """The speed of every GPU, checked where it is concrete.

    Raises:
        ValueError: It is not one positive number for each GPU.
    """
    if speed is None:
        return None
    array = jnp.asarray(speed, jnp.float32)
    if array.shape != (topology.num_gpus,):
        raise ValueError(f"speed must have the shape ({topology.num_gpus},), got {array.shape}")
    if is_concrete(array):
        for gpu in np.flatnonzero(~((np.asarray(array) > 0) & (np.asarray(array) < np.inf)))[:1]:
            raise ValueError(
                f"speed of GPU {gpu} is {np.asarray(array)[gpu]}; speeds must be finite and more "
                "than 0; for a GPU that takes no experts use active, or slots of 0"
            )
    return array
