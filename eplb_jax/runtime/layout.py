"""How the leaves of a tree of weights lie on a mesh: one row for every slot, or every expert."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef, keystr
from jaxtyping import Array, Bool, Int32, PyTree

from eplb_jax.checks import check_divides
from eplb_jax.runtime.transport import axis_size, transported
from eplb_jax.types import AxisName, Placement


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

    def taken(self, leaves: list[Array], rows: Int32[Array, "*L Z"]) -> list[Array]:
        """These rows in slots, of tables that every device has whole."""
        return _taken(*self._placed(leaves, rows, out=True), layout=self, out=True)

    def gathered(self, leaves: list[Array], rows: Int32[Array, "*L Z"]) -> list[Array]:
        """These rows, on every device."""
        return _taken(*self._placed(leaves, rows, out=False), layout=self, out=False)

    def _placed(self, leaves: list[Array], rows: Array, *, out: bool) -> tuple[list[Array], Array]:
        specs, over = (self.whole, self.slots) if out else (self.specs, PartitionSpec())
        leaves = [self._put(x, spec) for x, spec in zip(leaves, specs, strict=True)]
        return leaves, self._put(jnp.asarray(rows), over)

    @property
    def whole(self) -> tuple[PartitionSpec, ...]:
        """How leaves lie of which every device has all rows."""
        before, after = slice(self.rows), slice(self.rows + 1, None)
        return tuple(PartitionSpec(*x[before], None, *x[after]) for x in self.specs)

    @property
    def slots(self) -> PartitionSpec:
        """How a map of slots lies."""
        return PartitionSpec(*(None,) * self.rows, self.axis_name)

    def everywhere(self, array: Array | np.ndarray) -> Array:
        """The same array on every device."""
        return self._put(jnp.asarray(array), PartitionSpec())

    def _put(self, array: Array, spec: PartitionSpec) -> Array:
        """The array where it is to lie, on meshes with automatic or with explicit axes."""
        sharding = NamedSharding(self.mesh, spec)
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        named = [
            name for x in spec if x is not None for name in ((x,) if isinstance(x, str) else x)
        ]
        if all(kinds[x] == AxisType.Explicit for x in named or kinds):
            return jax.sharding.reshard(array, sharding)
        return lax.with_sharding_constraint(array, sharding)


@partial(jax.jit, static_argnames=("layout", "out"))
def _taken(leaves: list[Array], rows: Array, *, layout: Layout, out: bool) -> list[Array]:
    take = lambda x, row: x[row]  # noqa: E731
    take = jax.vmap(take) if layout.rows else take

    def on_device(xs: list[Array], row: Array) -> list[Array]:
        if not out:
            xs = [lax.all_gather(x, layout.axis_name, axis=layout.rows, tiled=True) for x in xs]
        return [take(x, row) for x in xs]

    whole, spread = list(layout.whole), list(layout.specs)
    ins, outs = ((whole, layout.slots), spread) if out else ((spread, PartitionSpec()), whole)
    mapped = jax.shard_map(
        on_device, mesh=layout.mesh, in_specs=ins, out_specs=outs, check_vma=False
    )
    return mapped(leaves, rows)


def layout_of(
    tree: PyTree[Array],
    placement: Placement,
    mesh: Mesh,
    axis_name: AxisName,
    specs: PyTree[PartitionSpec] | None,
    name: str,
    *,
    logical: bool = False,
) -> Layout:
    """The layout of an argument of this name, with a row for every slot, or logical expert.

    Raises:
        ValueError: A leaf has other rows, does not have them over `axis_name`, or its layers over
            any axis; the mesh has no such axis, or its size does not divide the slots.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for axis in names:
        if axis not in mesh.shape:
            raise ValueError(f"axis_name={axis!r} is no axis of the mesh; it has {mesh.axis_names}")
    shape = (placement.logcnt if logical else placement.phy2log).shape
    rows = len(shape) - 1
    none = lambda x: x is None  # noqa: E731
    unseen = jax.tree.map(lambda x: PartitionSpec() if x is None else x, specs, is_leaf=none)
    given = jax.tree.broadcast(unseen, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    resolved = []
    for (path, leaf), spec in zip(
        jax.tree.leaves_with_path(tree),
        jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, PartitionSpec)),
        strict=True,
    ):
        title = name + keystr(path)
        if leaf.shape[: len(shape)] != shape:
            raise ValueError(
                f"{title} has the shape {leaf.shape}; by the plan, it begins with {tuple(shape)}"
            )
        spec = spec if any(spec) else _seen(leaf, mesh)
        spec = [*spec, *(None,) * (leaf.ndim - len(spec))]
        spec[rows] = axis_name if spec[rows] is None else spec[rows]
        spec = PartitionSpec(*spec)
        over = (spec[rows],) if isinstance(spec[rows], str) else spec[rows]
        if over != names:
            raise ValueError(
                f"{title} lies as {spec}; its axis {rows}, of slots, must lie over "
                f"axis_name={axis_name!r}"
            )
        if rows and spec[0] is not None:
            raise ValueError(
                f"{title} lies as {spec}; its layers must not lie over an axis: relocate those of "
                f"{spec[0]!r} by plans of their own"
            )
        resolved.append(spec)
    axis_name = axis_name if isinstance(axis_name, str) else names
    layout = Layout(mesh, axis_name, tuple(resolved), jax.tree.structure(tree), rows)
    check_divides("size of axis_name", layout.num_gpus, "slots", placement.phy2log.shape[-1])
    return layout


def _seen(leaf: Array | np.ndarray, mesh: Mesh) -> PartitionSpec:
    """How an array lies on this mesh, where that can be seen; else as if on no axis."""
    # Of a traced array only explicit axes can be seen.
    sharding = getattr(jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
        return sharding.spec
    return PartitionSpec()
