"""Orders in which a construction takes the items: this is where candidates differ.

Items are numbered by rank: item 0 has the largest weight, so the LPT order is 0, 1, 2, ... What an
order draws at random is drawn once and shared by all layers, so the packing of a layer does not
depend on the other layers, and L layers cost one draw.

An order is a frozen value with `count`, the number of candidates, and `draw`, which returns one
candidate a lane: int32 is an order of the ranks, the same for every layer; float32 are factors of
the sort keys, by which every layer sorts its own weights in descending order.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.arrays import unfused
from eplb_jax.packing.sorting import descending_order


@runtime_checkable
class Order(Protocol):
    """What a strategy asks of a family of candidate orders."""

    @property
    def count(self) -> int:
        """How many candidates the family has."""
        ...

    def draw(self, key: Key[Array, ""], num_items: int) -> Array:
        """Orders (int32) or factors of the sort keys (float32), one candidate a lane."""
        ...


@dataclass(frozen=True)
class Lpt:
    """Longest processing time first: by descending weight (Graham, 1969)."""

    count: int = 1

    def draw(self, key: Key[Array, ""], num_items: int) -> Int32[Array, "n K"]:
        """The ranks themselves."""
        del key
        return jnp.tile(jnp.arange(num_items, dtype=jnp.int32)[:, None], (1, self.count))


@dataclass(frozen=True)
class Zigzag:
    """Largest, smallest, second largest, second smallest, ..."""

    count: int = 1

    def draw(self, key: Key[Array, ""], num_items: int) -> Int32[Array, "n K"]:
        """The first half of the ranks in even positions, the second half reversed in odd ones."""
        del key
        position = jnp.arange(num_items, dtype=jnp.int32)
        rank = position // 2
        order = jnp.where(position % 2 == 0, rank, num_items - 1 - rank)
        return jnp.tile(order[:, None], (1, self.count))


@dataclass(frozen=True)
class Shuffle:
    """Uniformly random permutations."""

    count: int

    def draw(self, key: Key[Array, ""], num_items: int) -> Int32[Array, "n K"]:
        """One permutation a lane."""
        return descending_order(jax.random.uniform(key, (num_items, self.count), jnp.float32))


@dataclass(frozen=True)
class NoisyLpt:
    """LPT with sort keys multiplied by U[low, high]."""

    count: int
    low: float
    high: float

    def draw(self, key: Key[Array, ""], num_items: int) -> Float[Array, "n K"]:
        """The factors."""
        uniform = jax.random.uniform(key, (num_items, self.count), jnp.float32)
        return self.low + unfused((self.high - self.low) * uniform)


@dataclass(frozen=True)
class RampedLpt:
    """LPT with sort keys multiplied by 1 + U[0, s], s from start to stop in equal steps."""

    count: int
    start: float
    stop: float

    def draw(self, key: Key[Array, ""], num_items: int) -> Float[Array, "n K"]:
        """The factors."""
        scale = jnp.asarray(np.linspace(self.start, self.stop, self.count, dtype=np.float32))[None]
        return 1 + unfused(scale * jax.random.uniform(key, (num_items, self.count), jnp.float32))
