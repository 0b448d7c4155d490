"""Refinements by exchanges that keep items with one label in distinct packs.

A pack that holds a label twice has a duplicate. No exchange here creates one, and duplicates are
removed before loads are balanced. Over T windows of time, exchanges lower the squares of loads,
summed over packs and windows: packs that are balanced in every window are balanced in later ones
that mix them.

Contents are [m, c] everywhere else; here the positions of a pack are rows and the packs are
columns, so that a step is elementwise work on rows of packs, without sorts or scatters.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Key, Num

from eplb_jax.packing.items import Items, with_bits
from eplb_jax.packing.refinement import Refinement

BITS = 26
"""Bits of the load of a pack."""

BITS_OF_SQUARES = 20
"""The same for several windows: squares of small differences are exact in float32."""


class State(NamedTuple):
    """The item in every position, with its loads in fixed point and its label."""

    value: Int32[Array, "T c m"]
    item: Int32[Array, "c m"]
    label: Int32[Array, "c m"]


def columns(x: Num[Array, "*T n"], index: Int32[Array, "..."]) -> Num[Array, "..."]:
    """``x[..., index]`` for indices known to be in range."""
    return x.at[..., index].get(mode="promise_in_bounds")


def pack_loads(value: Int32[Array, "T c m"]) -> Int32[Array, "T m"]:
    """The loads of packs."""
    return jnp.sum(value, axis=1, dtype=jnp.int32)


def count_windows(value: Int32[Array, "T c m"]) -> Int32[Array, ""]:
    """The number of windows up to the last one with load; at least 1."""
    if len(value) == 1:
        return jnp.ones((), jnp.int32)
    busy = jnp.any(value > 0, axis=(1, 2))
    return jnp.max(jnp.where(busy, jnp.arange(1, len(value) + 1, dtype=jnp.int32), 1))


def is_duplicate(label: Int32[Array, "c m"]) -> Bool[Array, "c m"]:
    """Which positions hold a label that an earlier position of their pack holds."""
    position = jnp.arange(label.shape[0], dtype=jnp.int32)
    earlier = (position[None] < position[:, None])[:, :, None]
    return jnp.any((label[:, None] == label[None]) & earlier, axis=1)


class Exchanges(Refinement):
    """A refinement as a function of the state."""

    keeps_labels: ClassVar[bool] = True
    uses_windows: ClassVar[bool] = True

    @abstractmethod
    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """The state of one packing after all steps; without labels every item has its own."""

    def refine(
        self, contents: Int32[Array, "m c"], items: Items, key: Key[Array, ""]
    ) -> Int32[Array, "m c"]:
        """Refine one packing."""
        item, label = contents.T, items.label
        windows = items.windows if self.uses_windows else items.units[None]
        windows = with_bits(windows, BITS if len(windows) == 1 else BITS_OF_SQUARES)
        labels = jnp.arange(item.size, dtype=jnp.int32) if label is None else label
        state = State(windows[:, item], item, labels[item])
        return self.improve(state, key, labelled=label is not None).item.T
