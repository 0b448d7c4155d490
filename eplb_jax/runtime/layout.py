"""How the leaves of a tree of weights lie on a mesh: one row for every slot, or every expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef, keystr
from jaxtyping import Array, Bool, Int32, PyTree

from eplb_jax.runtime.counting import AxisName
from eplb_jax.runtime.transport import axis_size, transported


@dataclass(frozen=True)
class Layout:
    """Where the rows of some leaves lie.

    Attributes:
        mesh: The devices.
        axis_name: The axes over which rows lie.
        specs: How every leaf lies, rows and all.
        tree: How the leaves make up a tree.
        rows: Which axis of the leaves has the rows: 1 after one of layers, else 0.
    """

    mesh: Mesh
    axis_name: AxisName
    specs: tuple[PartitionSpec, ...]
    tree: PyTreeDef
    rows: int

    @property
    def num_gpus(self) -> int:
        """The devices that rows lie over."""
        return axis_size(self.mesh, self.axis_name)

    def carried(
        self,
        leaves: list[Array],
        held: Int32[Array, "*L S"],
        wanted: Int32[Array, "*L Z"],
        changes: Bool[Array, "*L"],
        num_experts: int,
        *,
        source: Int32[Array, "*L Z"] | None = None,
        add: bool = False,
    ) -> list[Array]:
        """Leaves of the rows that are wanted, of those held: see `transported`."""
        maps = jax.tree.map(self.everywhere, (held, wanted, changes, source))
        return transported(
            [self._put(x, spec) for x, spec in zip(leaves, self.specs, strict=True)],
            *maps,
            num_experts=num_experts,
            mesh=self.mesh,
            axis_name=self.axis_name,
            specs=self.specs,
            add=add,
        )

    def read(self, leaves: list[np.ndarray], wanted: Int32[np.ndarray, "*L Z"]) -> list[Array]:
        """The rows that are wanted, of tables on the host; each is read where it will lie."""

        def part(leaf: np.ndarray, index: Any) -> np.ndarray:
            if self.rows == 0:
                return leaf[wanted[index[0]]][(slice(None), *index[1:])]
            layer = np.arange(leaf.shape[0])[index[0], None]
            rows = leaf[layer, wanted[index[0]][:, index[1]]]
            return rows[(slice(None), slice(None), *index[2:])]

        def from_host(leaf: np.ndarray, spec: PartitionSpec) -> Array:
            shape = (*wanted.shape, *leaf.shape[self.rows + 1 :])
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(shape, sharding, lambda index: part(leaf, index))

        return [from_host(x, spec) for x, spec in zip(leaves, self.specs, strict=True)]

    def taken(self, leaves: list[Array], wanted: Int32[Array, "*L Z"]) -> list[Array]:
        """The rows that are wanted, of tables that every device has whole."""
        take = jax.vmap(lambda x, row: x[row]) if self.rows else lambda x, row: x[row]
        take_all = lambda xs, row: [take(x, row) for x in xs]  # noqa: E731
        whole = tuple(self._whole(spec) for spec in self.specs)
        over = PartitionSpec(*(None,) * self.rows, self.axis_name)
        return self._mapped(take_all, leaves, wanted, (whole, over), self.specs)

    def gathered(self, leaves: list[Array], first: Int32[Array, "*L E"]) -> list[Array]:
        """Tables that every device has whole, of these rows."""
        take = jax.vmap(lambda x, row: x[row]) if self.rows else lambda x, row: x[row]

        def gather_all(xs: list[Array], row: Array) -> list[Array]:
            gather = lambda x: lax.all_gather(x, self.axis_name, axis=self.rows, tiled=True)  # noqa: E731
            return [take(gather(x), row) for x in xs]

        whole = tuple(self._whole(spec) for spec in self.specs)
        return self._mapped(gather_all, leaves, first, (self.specs, PartitionSpec()), whole)

    def _whole(self, spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(*spec[: self.rows], None, *spec[self.rows + 1 :])

    def _mapped(self, function: Any, leaves: list[Array], row: Array, ins: Any, outs: Any) -> Any:
        specs = (list(ins[0]), ins[1])
        leaves = [self._put(x, spec) for x, spec in zip(leaves, ins[0], strict=True)]
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=list(outs), check_vma=False
        )
        return jax.jit(mapped)(leaves, self._put(jnp.asarray(row), ins[1]))

    def everywhere(self, array: Array | np.ndarray) -> Array:
        """The same array on every device."""
        return self._put(jnp.asarray(array), PartitionSpec())

    def _put(self, array: Array, spec: PartitionSpec) -> Array:
        """The array where it is to lie, on meshes with automatic or with explicit axes."""
        sharding = NamedSharding(self.mesh, spec)
        if all(kind == AxisType.Explicit for kind in self.mesh.axis_types):
            return jax.sharding.reshard(array, sharding)
        return lax.with_sharding_constraint(array, sharding)


def layout_of(
    tree: PyTree[Array],
    shape: Sequence[int],
    mesh: Mesh,
    axis_name: AxisName,
    specs: PyTree[PartitionSpec] | None,
) -> Layout:
    """The layout of a tree whose leaves have rows of this shape, [L, S] or [S].

    Raises:
        ValueError: A leaf has other rows, or does not have them over `axis_name`; the mesh has no
            such axis, or its size does not divide the rows.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"axis_name={name!r} is no axis of the mesh; it has {mesh.axis_names}")
    rows = len(shape) - 1
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)  # noqa: E731
    given = jax.tree.broadcast(specs, tree, is_leaf=is_spec)
    resolved = []
    for (path, leaf), spec in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(given, is_leaf=is_spec), strict=True
    ):
        if leaf.shape[: len(shape)] != tuple(shape):
            raise ValueError(
                f"params{keystr(path)} has the shape {leaf.shape}; by the plan, it begins with "
                f"{tuple(shape)}"
            )
        spec = _seen(leaf, mesh) if spec is None else spec
        spec = [*spec, *(None,) * (leaf.ndim - len(spec))]
        spec[rows] = axis_name if spec[rows] is None else spec[rows]
        spec = PartitionSpec(*spec)
        over = (spec[rows],) if isinstance(spec[rows], str) else spec[rows]
        if over != names:
            raise ValueError(
                f"params{keystr(path)} lies as {spec}; its axis {rows}, of slots, must lie over "
                f"axis_name={axis_name!r}"
            )
        resolved.append(spec)
    axis_name = axis_name if isinstance(axis_name, str) else names
    return Layout(mesh, axis_name, tuple(resolved), jax.tree.structure(tree), rows)


def _seen(leaf: Array | np.ndarray, mesh: Mesh) -> PartitionSpec:
    """How an array lies on this mesh, where that can be seen; else as if on no axis."""
    # Of a traced array only explicit axes can be seen.
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        return sharding.spec
    return PartitionSpec()
