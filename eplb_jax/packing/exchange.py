"""Refinements that know which items must not meet: exchanges in all packs at once.

Items may carry labels (replicas of one expert share one); a pack that holds a label twice has a
repeat. No exchange here brings about a repeat, and repeats are removed before loads are evened.

An item has one load, or one in each of T windows of time. Then a pack has T loads too, and
exchanges lessen the squares of loads, added up over packs and windows: packs come out even in
every window, hence in those to come that mix what was seen.

The state is kept with the places of a pack as rows and the packs as columns, so that a step is
elementwise work on rows of packs, without sorts or scatters.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Key, Num

from eplb_jax.arrays import fixed_point

BITS = 26
"""For the load of a pack."""

BITS_OF_SQUARES = 20
"""The same for several windows: squares of what may be the least are whole numbers in float32."""


class State(NamedTuple):
    """The item in every place, with its loads in fixed point and its label."""

    value: Int32[Array, "T c m"]
    item: Int32[Array, "c m"]
    label: Int32[Array, "c m"]


def columns(x: Num[Array, "*T n"], index: Int32[Array, "..."]) -> Num[Array, "..."]:
    """``x[..., index]`` for indices known to be in range."""
    return x.at[..., index].get(mode="promise_in_bounds")


def loads(value: Int32[Array, "T c m"]) -> Int32[Array, "T m"]:
    """The loads of packs."""
    return jnp.sum(value, axis=1, dtype=jnp.int32)


def repeats(label: Int32[Array, "c m"]) -> Bool[Array, "c m"]:
    """Which places hold a label that an earlier place of their pack holds."""
    earlier = np.tri(label.shape[0], k=-1, dtype=bool)[:, :, None]
    return jnp.any((label[:, None] == label) & earlier, axis=1)


class Exchanges:
    """A refinement as a function of the state."""

    keeps_labels: ClassVar[bool] = True
    sees_windows: ClassVar[bool] = True

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """The state of one packing after all steps; without labels every item has its own."""
        raise NotImplementedError

    def __call__(
        self,
        contents: Int32[Array, "m c *K"],
        weight: Float[Array, "..."],
        key: Key[Array, ""],
        label: Int32[Array, "..."] | None = None,
    ) -> Int32[Array, "m c *K"]:
        """Refine every lane."""
        if contents.ndim > 2:
            own_weight = weight.ndim > 1 + self.sees_windows
            own_label = label is not None and label.ndim > 1
            axes = -1, -1 if own_weight else None, None, -1 if own_label else None
            return jax.vmap(self, axes, -1)(contents, weight, key, label)
        state = _state(contents, weight, label)
        return self.improve(state, key, labelled=label is not None).item.T


def _state(
    contents: Int32[Array, "m c"], weight: Float[Array, "*T n"], label: Int32[Array, " n"] | None
) -> State:
    item, n = contents.T, weight.shape[-1]
    label = jnp.arange(n, dtype=jnp.int32) if label is None else label
    windows = weight.reshape(-1, n)
    bits = BITS if windows.shape[0] == 1 else BITS_OF_SQUARES
    return State(fixed_point(windows, item.shape[0], bits)[:, item], item, label[item])
