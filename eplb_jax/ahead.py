"""Compilation ahead of time: a plan function whose calls never wait for a compiler."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from eplb_jax.packing.strategy import Strategy
from eplb_jax.rebalance import Policy, rebalance_experts
from eplb_jax.types import Placement
from eplb_jax.validation import LoadLike, as_count, as_experts, as_load, check_complete


@dataclass(frozen=True)
class CompiledPlan:
    """`eplb_jax.rebalance_experts` with all but the loads, and the plan in place, filled in.

    Attributes:
        shape: Of the loads: (L, E), or (T, L, E).
        num_replicas: R.
        previous: Whether a call takes the plan in place.
        executable: What was compiled; it has `cost_analysis` and `memory_analysis`.
    """

    shape: tuple[int, ...]
    num_replicas: int
    previous: bool
    executable: jax.stages.Compiled = field(repr=False)
    sharding: jax.sharding.Sharding | None = field(repr=False)

    def __call__(self, weight: LoadLike, previous: Placement | LoadLike | None = None) -> Placement:
        """Plan: `eplb_jax.rebalance_experts` of these loads, bit for bit.

        Args:
            weight: Loads of `shape`, of any real dtype; anything `jnp.asarray` takes.
            previous: The plan in place, of which the phy2log [L, R] counts, or that; if, and only
                if, it was compiled for one.

        Raises:
            TypeError: `previous` is missing or not expected, or an argument is of the wrong kind.
            ValueError: The shape is another, a load is NaN, infinite or negative, or `previous` is
                of another shape or lacks an expert.
        """
        load = as_load(weight, "weight", windows=True)
        if load.shape != self.shape:
            raise ValueError(
                f"weight must have the shape that was compiled for, {self.shape}, got {load.shape}"
            )
        if self.previous != (previous is not None):
            expected = "needs" if self.previous else "takes no"
            raise TypeError(
                f"this plan {expected} previous; compile with previous={not self.previous}"
            )
        arguments = [jax.device_put(load, self.sharding)]
        if previous is not None:
            num_layers, num_experts = self.shape[-2:]
            old = as_experts(previous, "previous", (num_layers, self.num_replicas), num_experts)
            check_complete(old, num_experts, "previous")
            arguments.append(old)
        return self.executable(*arguments)


def compile(  # noqa: A001
    shape: Sequence[int],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: bool = False,
    max_moves: int | None = None,
    price: float = 0.0,
    sharding: jax.sharding.Sharding | None = None,
) -> CompiledPlan:
    """Compile `rebalance_experts` for loads of one shape, before the first of them is there.

    The whole plan is one executable. With JAX's persistent compilation cache
    (``jax.config.update("jax_compilation_cache_dir", path)``) a later process reads it from there.

    Args:
        shape: (L, E), or (T, L, E), of the loads to come.
        num_replicas: R, and all that follow, as in `rebalance_experts`.
        num_groups: Groups of experts.
        num_nodes: N.
        num_gpus: G.
        policy: "auto", "global" or "hierarchical".
        strategy: A name or a `Strategy`.
        key: Where the strategy draws at random. None: a fixed key.
        previous: Whether calls take the plan in place.
        max_moves: As in `rebalance_experts`; with `previous`.
        price: As in `rebalance_experts`; with `previous`.
        sharding: Where the loads will lie, for instance layers over a mesh; None: JAX's default
            device.

    Returns:
        A function of loads, and of the plan in place, that returns a `Placement`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `rebalance_experts`, or `shape` is neither (L, E) nor (T, L, E).

    Example:
        >>> plan = compile((1, 4), 6, 1, 1, 3)
        >>> plan([[90, 30, 20, 10]]).phy2log.tolist()
        [[0, 3, 0, 3, 1, 2]]
    """
    axes = tuple(as_count("shape", size, least=0) for size in shape)
    if len(axes) not in (2, 3):
        raise ValueError(f"shape must be (L, E) or (T, L, E), got {axes}")
    counts = num_replicas, num_groups, num_nodes, num_gpus
    options = {"policy": policy, "strategy": strategy, "key": key}
    limits = {"max_moves": max_moves, "price": price}

    def plan(weight: Array, *old: Array) -> Placement:
        in_place = old[0] if old else None
        return rebalance_experts(weight, *counts, **options, previous=in_place, **limits)

    arguments = [jax.ShapeDtypeStruct(axes, jnp.float32, sharding=sharding)]
    if previous:
        slots = axes[-2], as_count("num_replicas", num_replicas)
        arguments.append(jax.ShapeDtypeStruct(slots, jnp.int32))
    executable = jax.jit(plan).lower(*arguments).compile()
    return CompiledPlan(axes, int(num_replicas), previous, executable, sharding)
