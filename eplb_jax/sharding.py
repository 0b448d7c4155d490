"""Functions of layers on meshes with explicit axes, which JAX makes by default."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

Function = TypeVar("Function", bound=Callable)


def by_layers(function: Function) -> Function:
    """Let the compiler partition a function of layers; its results are sharded by layer.

    On explicit axes JAX requires the sharding of every gather, which a function of independent
    layers does not need. Without explicit axes this does nothing. The layers are the last axis but
    one of the first array that has two axes, and the first axis of every result.
    """

    @wraps(function)
    def automatic(*args, **kwargs):
        if explicit_mesh(*args) is None:
            return function(*args, **kwargs)
        arrays = [x for x in jax.tree.leaves(args) if getattr(x, "ndim", 0) > 1]
        layers = spec_of(arrays[0])[arrays[0].ndim - 2 :][:1] if arrays else ()
        return under_auto(lambda *x: function(*x, **kwargs), PartitionSpec(*layers), *args)

    return automatic  # pyright: ignore[reportReturnType]


def under_auto(function: Callable, spec: Any, *args: Any) -> Any:
    """Call a function with explicit axes as automatic ones; its results are sharded by `spec`.

    That is one `PartitionSpec` for all, or a pytree with one for each.
    """
    mesh = explicit_mesh(*args)
    if mesh is None:
        return function(*args)
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in axes if kind == AxisType.Explicit)
    sharding = jax.tree.map(
        partial(NamedSharding, mesh), spec, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=sharding)(*args)


def explicit_mesh(*args: Any) -> AbstractMesh | None:
    """The mesh with explicit axes of these arrays, or the one that is set; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return mesh
    for array in jax.tree.leaves(args):
        mesh = jax.typeof(array).sharding.mesh if isinstance(array, jax.Array) else mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def spec_of(array: Array | np.ndarray) -> PartitionSpec:
    """The partition of an array on explicit axes; no axes elsewhere."""
    spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else ()
    return PartitionSpec(*spec, *(None,) * (array.ndim - len(spec)))
