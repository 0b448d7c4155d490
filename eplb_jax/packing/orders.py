"""Orders in which a construction takes the items: where candidates differ.

Items are known by their rank: item 0 is the heaviest, so the LPT order is 0, 1, 2, ... What an
order draws at random is drawn once and shared by all layers. A layer's plan then does not
depend on which other layers were planned with it, and planning L layers costs one draw.

An order is a frozen value with `count`, the number of candidates, and `draw`, which returns one
candidate a lane: whole numbers are an order of the ranks, the same for every layer; floats
are factors of the sort keys, by which every layer sorts its own weights downwards.
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
    """Longest processing time first: by falling weight (Graham, 1969)."""

    count: int = 1

    def draw(self, key: Key[Array, ""], num_items: int) -> Int32[Array, "n K"]:
        """The ranks themselves."""
        del key
        return jnp.tile(jnp.arange(num_items, dtype=jnp.int32)[:, None], (1, self.count))


@dataclass(frozen=True)
class Zigzag:
    """Heaviest, lightest, second heaviest, second lightest, ..."""

    count: int = 1

    def draw(self, key: Key[Array, ""], num_items: int) -> Int32[Array, "n K"]:
        """The heavier half forwards on even places, the lighter half backwards on odd ones."""
        del key
        place = jnp.arange(num_items, dtype=jnp.int32)
        order = jnp.where(place % 2 == 0, place // 2, num_items - 1 - place // 2)
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
    """LPT with sort keys multiplied by 1 + U[0, s], s rising evenly from start to stop."""

    count: int
    start: float
    stop: float

    def draw(self, key: Key[Array, ""], num_items: int) -> Float[Array, "n K"]:
        """The factors."""
        scale = jnp.asarray(np.linspace(self.start, self.stop, self.count, dtype=np.float32))
        return 1 + unfused(scale * jax.random.uniform(key, (num_items, self.count), jnp.float32))
