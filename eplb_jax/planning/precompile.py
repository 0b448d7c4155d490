"""Compilation ahead of time: a plan function whose calls never wait for a compiler."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.history import History
from eplb_jax.planning.next_plan import TOLERANCE, Limits, as_limits
from eplb_jax.planning.placement import as_placement
from eplb_jax.planning.plan import plan
from eplb_jax.planning.policy import Policy
from eplb_jax.planning.strategies import Strategy
from eplb_jax.types import Placement, Topology, check_topology


@dataclass(frozen=True)
class CompiledPlan:
    """`eplb_jax.plan` for loads of one shape, compiled: all but the loads and the plan in place.

    Attributes:
        shape: Of the loads: (L, E), or (T, L, E); of a history, the shapes of its arrays.
        topology: What plans are made for.
        with_previous: Whether a call takes the plan in place.
        limits: Of a call that names none: tolerance, max_moves and move_penalty.
        takes: Which of these a call may name.
        executable: What was compiled; it has `cost_analysis` and `memory_analysis`.
        sharding: Of the loads; None: JAX's default device.
    """

    shape: tuple[int, ...] | History
    topology: Topology
    with_previous: bool
    limits: Limits
    takes: tuple[str, ...]
    executable: jax.stages.Compiled = field(repr=False)
    sharding: jax.sharding.Sharding | None = field(repr=False)

    def __call__(
        self,
        load: LoadLike | History,
        previous: Placement | LoadLike | None = None,
        *,
        tolerance: float | None = None,
        max_moves: int | None = None,
        move_penalty: float | None = None,
        check: bool = True,
    ) -> Placement:
        """The plan that `eplb_jax.plan` makes of these loads, bit for bit.

        Args:
            load: Loads of `shape`, of any real dtype; anything `jnp.asarray` takes. Or a history.
            previous: The plan in place or its phy2log [L, R], if `with_previous`.
            tolerance: Another one than was compiled with, which compiles nothing. None: that.
            max_moves: Likewise, but not with a cost.
            move_penalty: Likewise, but neither with a cost nor with a flexible split.
            check: Whether to reject loads that are NaN, infinite or negative; checking a JAX
                array waits for its device.

        Raises:
            TypeError: `previous` is missing or not expected, or an argument is of the wrong kind.
            ValueError: The shape is another, a load is NaN, infinite or negative, `previous` is of
                another shape or lacks an expert, or a limit is not one that plans take.
        """
        named = {"max_moves": max_moves, "move_penalty": move_penalty}
        for name, value in named.items():
            if value is not None and name not in self.takes:
                raise ValueError(f"{name}={value} is no limit of these plans; nearest: {name}=None")
        if isinstance(load, History):
            array, shape, axes = load, jax.tree.map(jnp.shape, load), load.current.shape
        else:
            array = as_load(load, "load", least_axes=2, check=check)
            shape = axes = array.shape
        if shape != self.shape:
            raise ValueError(
                f"load must have the shape that was compiled for, {self.shape}, got {shape}"
            )
        if self.with_previous != (previous is not None):
            expected = "needs" if self.with_previous else "takes no"
            raise TypeError(
                f"this plan {expected} previous; "
                f"precompile with with_previous={not self.with_previous}"
            )
        arguments: list[Any] = [jax.device_put(array, self.sharding)]
        if previous is not None:
            old = as_placement(previous, "previous", axes[-1])
            got, wanted = tuple(x.shape for x in old), _shapes(axes, self.topology)
            if got != wanted:
                raise ValueError(f"previous must have maps of the shapes {wanted}, got {got}")
            arguments.append(jax.device_put(old, _by_layer(self.sharding)))
            arguments.append(as_limits(tolerance, max_moves, move_penalty, self.limits))
        return self.executable(*arguments)


def precompile(
    shape: Sequence[int] | History,
    topology: Topology,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    with_previous: bool = False,
    tolerance: float = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> CompiledPlan:
    """Compile `plan` for loads of one shape, before there are any.

    The whole plan is one executable. With JAX's persistent compilation cache
    (``jax.config.update("jax_compilation_cache_dir", path)``) a later process reads it from there.

    Args:
        shape: (L, E) or (T, L, E): the shape of the loads. Or a history of that shape, such as
            that of `eplb_jax.init_history`.
        topology: As of `plan`, like policy, strategy and key.
        policy: "auto", "global" or "hierarchical".
        strategy: A name or a `Strategy`.
        key: For strategies that draw at random.
        with_previous: Whether calls take the plan in place; needed for the two limits.
        tolerance: How much worse than a new plan the next one may be.
        max_moves: Per layer, the maximum number of moves.
        move_penalty: Imbalance that a move must gain.
        split: As of `plan`.
        cost: As of `plan`.
        sharding: Of the loads, for instance layers over a mesh; None: JAX's default device.

    Returns:
        A function of loads, and of the plan in place, that returns a `Placement`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `plan`, or `shape` is neither (L, E) nor (T, L, E).

    Example:
        >>> compiled = precompile((1, 4), Topology(3, slots=2))
        >>> compiled([[90, 30, 20, 10]]).phy2log.tolist()
        [[0, 3, 0, 3, 1, 2]]
    """
    if isinstance(shape, History):
        axes, compiled_for = shape.current.shape, jax.tree.map(jnp.shape, shape)
        load = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            shape,
        )
        if sharding is not None:
            raise ValueError("sharding must be None for a history; a history has its own")
    else:
        axes = compiled_for = tuple(as_count("shape", size, least=0) for size in shape)
        load = jax.ShapeDtypeStruct(axes, jnp.float32, sharding=sharding)
        if len(axes) not in (2, 3):
            raise ValueError(f"shape must be (L, E) or (T, L, E), got {axes}")
    check_topology(topology)
    options: dict[str, Any] = {"policy": policy, "strategy": strategy, "key": key}
    options |= {"split": split, "cost": cost}
    takes = Limits._fields
    if split is not None:
        takes = ("tolerance", "max_moves")
    if cost is not None and not cost.is_proportional:
        takes = ("tolerance",)
    given = {"max_moves": max_moves, "move_penalty": move_penalty}
    if not with_previous or any(x is not None and n not in takes for n, x in given.items()):
        options |= given  # for the errors of the plan
    limits = as_limits(tolerance, max_moves, move_penalty)

    def make(
        load: Array | History, old: Placement | None = None, limits: Limits | None = None
    ) -> Placement:
        given = {} if limits is None else {x: getattr(limits, x) for x in takes}
        return plan(load, topology, previous=old, **given | options)

    arguments: list[Any] = [load]
    if with_previous:
        place = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=_by_layer(sharding))
        arguments.append(Placement(*(place(x) for x in _shapes(axes, topology))))  # pyright: ignore
        # Compiles the conversion of a map, too.
        num_layers, num_experts = axes[-2:]
        slots = np.resize(np.arange(num_experts), (num_layers, topology.num_replicas))
        as_placement(slots, "previous", num_experts)
        arguments.append(limits)
    executable = jax.jit(make).lower(*arguments).compile()
    return CompiledPlan(compiled_for, topology, with_previous, limits, takes, executable, sharding)


def _by_layer(sharding: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """Maps of a plan where its loads are, layer by layer."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    layers = sharding.spec[-2:-1] if len(sharding.spec) > 1 else sharding.spec[:1]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*layers))


def _shapes(axes: Sequence[int], topology: Topology) -> tuple[tuple[int, ...], ...]:
    """The shapes of the maps of a plan for loads of the shape `axes`."""
    (num_layers, num_experts), num_slots = axes[-2:], topology.num_replicas
    most = num_slots - num_experts + 1
    return (num_layers, num_slots), (num_layers, num_experts, most), (num_layers, num_experts)
