"""How the leaves of a tree of weights are sharded: one row for every slot, or every expert."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array, Int32, PyTree

from eplb_jax.checks import check_divides
from eplb_jax.types import AxisName, Placement


class Layout(NamedTuple):
    """The mesh, the axes over which rows are sharded, and the sharding of every leaf; hashable."""

    mesh: Mesh | AbstractMesh
    axis_name: AxisName
    specs: tuple[PartitionSpec, ...]

    @property
    def num_gpus(self) -> int:
        """Number of devices over which rows are sharded."""
        return math.prod(self.mesh.shape[name] for name in _names(self.axis_name))


def layout_of(
    tree: PyTree[Array | np.ndarray],
    placement: Placement,
    mesh: Mesh | AbstractMesh,
    axis_name: AxisName,
    specs: PyTree[PartitionSpec] | None,
    name: str,
    *,
    logical: bool = False,
) -> Layout:
    """The checked layout of an argument with a row for every slot, or logical expert."""
    names = _names(axis_name)
    for axis in names:
        if axis not in mesh.shape:
            raise ValueError(f"axis_name={axis!r} is not an axis of the mesh: {mesh.axis_names}")
    shape = (placement.logcnt if logical else placement.phy2log).shape
    rows = len(shape) - 1
    # None stands for `PartitionSpec()`; to `jax.tree` it is a node without leaves.
    specs = jax.tree.map(lambda x: x or PartitionSpec(), specs, is_leaf=lambda x: x is None)
    given = jax.tree.leaves(jax.tree.broadcast(specs, tree))
    resolved = []
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(tree), given, strict=True):
        title = name + keystr(path)
        if leaf.shape[: len(shape)] != shape:
            raise ValueError(
                f"{title} has the shape {leaf.shape}; by the plan, it begins with {tuple(shape)}"
            )
        spec = spec if any(spec) else _spec_on(mesh, leaf)
        spec = [*spec, *(None,) * (leaf.ndim - len(spec))]
        spec[rows] = axis_name if spec[rows] is None else spec[rows]
        spec = PartitionSpec(*spec)
        if _names(spec[rows]) != names:
            raise ValueError(
                f"{title} is sharded as {spec}; its axis {rows}, of slots, must be sharded over "
                f"axis_name={axis_name!r}"
            )
        if rows and spec[0] is not None:
            raise ValueError(
                f"{title} is sharded as {spec}; layers must not be sharded: relocate those of "
                f"{spec[0]!r} with plans of their own"
            )
        resolved.append(spec)
    layout = Layout(mesh, axis_name if isinstance(axis_name, str) else names, tuple(resolved))
    check_divides("size of axis_name", layout.num_gpus, "slots", placement.phy2log.shape[-1])
    return layout


def _names(axis_name: Any) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _spec_on(mesh: Mesh | AbstractMesh, leaf: Array | np.ndarray) -> PartitionSpec:
    """The sharding of an array on this mesh where it is known: in a trace, of explicit axes."""
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        return sharding.spec
    return PartitionSpec()


def put(array: Array | np.ndarray, layout: Layout, spec: PartitionSpec) -> Array:
    """The array with this sharding, on meshes with automatic or with explicit axes."""
    array, mesh = jnp.asarray(array), layout.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named = [name for axis in spec if axis is not None for name in _names(axis)]
    if all(kinds[x] == AxisType.Explicit for x in named or kinds):
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))
    return lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def read_rows(
    leaf: np.ndarray, rows: Int32[np.ndarray, "*L Z"], layout: Layout, spec: PartitionSpec
) -> Array:
    """Rows of a table on the host, zeros for -1; every device reads only its own."""
    axis = rows.ndim - 1

    def part(index: Any) -> np.ndarray:
        chosen = rows[index[: axis + 1]]
        layers = (np.arange(len(leaf))[index[0], None],) * axis
        read = leaf[(*layers, chosen)][(slice(None),) * (axis + 1) + index[axis + 1 :]]
        read[chosen < 0] = 0
        return read

    shape = (*rows.shape, *leaf.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, NamedSharding(layout.mesh, spec), part)
