"""What is packed: the one place where weights become fixed-point numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import LOAD_BITS, fixed_point, look_up, normalise


class Items(NamedTuple):
    """The items of a layer; with lanes as the last axis of every array, of many candidates.

    Integer sums depend neither on their order nor on how a compiler fuses multiplications with
    additions, so the packing is the same in every batch, sharding and backend.

    Attributes:
        units: The weights in fixed point: any c of them add up to less than 2 ** `LOAD_BITS`.
        windows: What refinements balance: the weights in T windows of time, in fixed point.
        weight: The weights as they are: for sort keys with noise, and for DeepSeek's greedy.
        label: Items with one label are kept in distinct packs; None: every item has its own.
    """

    units: Int32[Array, "n *K"]
    windows: Int32[Array, "T n *K"]
    weight: Float[Array, "n *K"]
    label: Int32[Array, "n *K"] | None

    def take(self, index: Int32[Array, "k *K"]) -> "Items":
        """These items, lane by lane."""
        windows = jax.vmap(look_up, (0, None))(self.windows, index)
        label = None if self.label is None else look_up(self.label, index)
        return Items(look_up(self.units, index), windows, look_up(self.weight, index), label)

    def repeat(self, candidates: int) -> "Items":
        """The same items in so many lanes for each of theirs."""
        if candidates == 1:
            return self
        return jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=-1), self)


def items_of(
    weight: Float[Array, "n *L"],
    num_packs: int,
    label: Int32[Array, "n *L"] | None = None,
    windows: Float[Array, "T n *L"] | None = None,
) -> Items:
    """The items of layers, as lanes, with their weights in fixed point.

    Args:
        weight: Nonnegative weights in any unit; those of a layer are scaled by a power of two.
        num_packs: m; divides n.
        label: Labels of the items.
        windows: Weights in T windows, scaled together; None: the one window is `weight`.
    """
    capacity = weight.shape[0] // num_packs
    weight = normalise(weight, 0)
    units = fixed_point(weight, capacity, LOAD_BITS)
    if windows is None:
        return Items(units, units[None], weight, label)
    return Items(units, fixed_point(normalise(windows, (0, 1)), capacity, LOAD_BITS), weight, label)


def with_bits(units: Int32[Array, "..."], bits: int) -> Int32[Array, "..."]:
    """Fixed-point numbers of which any c add up to less than 2 ** bits."""
    return units >> (LOAD_BITS - bits)
