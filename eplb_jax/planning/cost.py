"""The time of an expert's replica: tokens rounded up to tiles, and weights that must be read.

A replica with n tokens in a step takes ``per_active_expert`` if n > 0, for its weights are read,
and ``per_token`` for each token, rounded up to whole tiles of a grouped matrix product. In a window
of many steps n varies: it counts as Poisson distributed, and the time is the expected one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from scipy.special import pdtrc

from eplb_jax.arrays import ordered_sum, take_rows, unfused
from eplb_jax.checks import as_amount, as_count

_POINTS_PER_ROOT = 16
"""The curve is known at means of (i / 16)^2 tokens, eight points in a standard deviation."""


@dataclass(frozen=True)
class Cost:
    """What a step of an expert's replica costs, in seconds or any unit of time.

    Attributes:
        per_token: Time of a token.
        per_active_expert: Time of a replica with at least one token in a step: of reading its
            weights. It dominates decoding, where a second replica is a second read.
        tile: Tokens are rounded up to a multiple of it; 128 in many grouped matrix products.
        tokens_per_step: Tokens of a layer in a step over all its experts: batch tokens of all GPUs
            times experts per token. None: every window of a load is one step.

    Raises:
        TypeError: A value is not a number, or tile not an integer.
        ValueError: A value is negative or not finite, both times are zero, or tile or
            tokens_per_step is less than 1.

    Example:
        >>> reads = Cost(per_token=0, per_active_expert=25e-6, tokens_per_step=64 * 8)

    References:
        METRO, 2025 (decoding takes the time of active experts). DeepSeek-AI, DeepGEMM (tiles).
    """

    per_token: float = 1.0
    per_active_expert: float = 0.0
    tile: int = 1
    tokens_per_step: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("per_token", "per_active_expert"):
            object.__setattr__(self, name, as_amount(name, getattr(self, name)))
        if self.per_token == self.per_active_expert == 0:
            raise ValueError(
                "per_token=0 and per_active_expert=0: nothing costs; nearest: per_token=1"
            )
        object.__setattr__(self, "tile", as_count("tile", self.tile))
        if self.tokens_per_step is not None:
            tokens = as_amount("tokens_per_step", self.tokens_per_step)
            if tokens < 1:
                raise ValueError(f"tokens_per_step={tokens} must be at least 1; nearest: 1")
            object.__setattr__(self, "tokens_per_step", tokens)

    @property
    def is_proportional(self) -> bool:
        """Whether time is proportional to tokens, so that balancing one balances the other."""
        return self.per_active_expert == 0 and self.tile == 1


class Curve(NamedTuple):
    """A cost as arrays, so that another one does not compile again.

    Attributes:
        expected: Time of a replica for means of (i / 16)^2 tokens in a step. Above the last, time
            grows by `per_token`. None: counts are known, and windows are steps.
        tokens_per_step: As of `Cost`; 0 where windows are steps.
    """

    expected: Float[Array, " n"] | None
    per_token: Float[Array, ""]
    per_active_expert: Float[Array, ""]
    tile: Float[Array, ""]
    tokens_per_step: Float[Array, ""]


def curve_of(cost: Cost, tokens_per_step: float | Array | None = None) -> Curve:
    """The curve of a cost, for a number of tokens in place of its own None."""
    tokens = cost.tokens_per_step if tokens_per_step is None else tokens_per_step
    expected = None
    if tokens is not None:
        # Beyond tile^2 tokens the standard deviation is that of a tile: rounding costs half a tile.
        point = np.arange(_POINTS_PER_ROOT * max(cost.tile, 4) + 1)
        mean = (point / _POINTS_PER_ROOT) ** 2
        most = int((mean[-1] + 10 * mean[-1] ** 0.5) / cost.tile) + 2
        tiles = sum(pdtrc(cost.tile * k, mean) for k in range(most)) * cost.tile
        tiles = mean if cost.tile == 1 else tiles
        hit = -np.expm1(-mean)
        expected = jnp.asarray(cost.per_active_expert * hit + cost.per_token * tiles, jnp.float32)
    numbers = cost.per_token, cost.per_active_expert, cost.tile, 0.0 if tokens is None else tokens
    return Curve(expected, *(jnp.asarray(x, jnp.float32) for x in numbers))


def time_of_replica(curve: Curve, tokens: Float[Array, "..."]) -> Float[Array, "..."]:
    """The time of a replica with so many tokens in a step: their mean, or their number."""
    if curve.expected is None:
        tiles = unfused(jnp.ceil(tokens / curve.tile) * curve.tile)
        tiles = jnp.where(curve.tile > 1, tiles, tokens)
        hit = jnp.minimum(tokens, 1)
        return unfused(curve.per_token * tiles) + unfused(curve.per_active_expert * hit)
    last = len(curve.expected) - 1
    place = jnp.sqrt(tokens) * _POINTS_PER_ROOT
    below = jnp.clip(place.astype(jnp.int32), 0, last - 1)
    at = below.astype(jnp.float32) / _POINTS_PER_ROOT
    width = unfused(2 * at + 1 / _POINTS_PER_ROOT) / _POINTS_PER_ROOT
    part = unfused(tokens - unfused(at * at)) / width
    low, high = take_rows(curve.expected, below), take_rows(curve.expected, below + 1)
    beyond = unfused(tokens - (last / _POINTS_PER_ROOT) ** 2)
    return jnp.where(
        beyond > 0,
        curve.expected[last] + unfused(curve.per_token * beyond),
        low + unfused((high - low) * jnp.clip(part, 0, 1)),
    )


def time_loads(
    load: Float[Array, "*TL E"], count: Int32[Array, "*TL E"], curve: Curve
) -> Float[Array, "*TL E"]:
    """The time of an expert in a window, over all its replicas, which are as many as `count`.

    Divided by the count it is that of a replica. So it stands for the load wherever counts do not
    change: in packing, and in the balance of a plan.
    """
    replicas = jnp.maximum(count, 1).astype(jnp.float32)
    if curve.expected is None:
        return replicas * time_of_replica(curve, load / replicas)
    total = ordered_sum(load, -1)[..., None]
    share = load / jnp.where(total > 0, total, 1)
    tokens = share * curve.tokens_per_step / replicas
    steps = total / curve.tokens_per_step
    return replicas * unfused(time_of_replica(curve, tokens) * steps)
