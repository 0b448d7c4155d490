"""How well each part of a history would have foretold the windows that came after it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import unfused
from eplb_jax.planning.windows import Groups, Windows, distance, weighted_mean

KEPT = 1 - 1 / 64
"""What is left of a weight or score after one more window."""


class Scores(NamedTuple):
    """How well each part of a history would have foretold the windows that came after it.

    Errors are sums of absolute differences of shares, weighted by evidence; older ones decay.

    Attributes:
        seen: Weight of the windows so far.
        error: Error of the mean of the recent windows.
        lead: By how much the error of each exponentially weighted mean was less.
        lead_squared: Sum of the squares of that.
        tried: Weight of the windows that there were remembered ones for.
        nearest: Distance to the nearest recent window.
        gain: By how much the nearest remembered one was nearer.
    """

    seen: Float[Array, " L"]
    error: Float[Array, " L"]
    lead: Float[Array, "gains L"]
    lead_squared: Float[Array, "gains L"]
    tried: Float[Array, " L"]
    nearest: Float[Array, " L"]
    gain: Float[Array, " L"]


def score(
    scores: Scores, means: Int32[Array, "gains L E"], groups: Groups, windows: Windows
) -> Scores:
    """The scores after the last window, by what was known before it: the others and these."""
    new, weight = windows.share[-1], windows.evidence[-1]
    share, known = windows.share[:-1], windows.evidence[:-1]

    def add(score: Float[Array, "*g L"], term: Float[Array, "*g L"]) -> Float[Array, "*g L"]:
        return unfused(score * KEPT) + unfused(term)

    # Before the second window the means are all the same.
    compared = jnp.where(jnp.sum((known > 0).astype(jnp.int32), axis=0) > 1, weight, 0)
    error = distance(new, weighted_mean(share, known))
    lead = error[None] - distance(new[None], means)
    far = 2.0  # no two windows are further apart
    nearest = jnp.min(jnp.where(known > 0, distance(new[None], share), far), axis=0)
    tried, gain = jnp.zeros_like(weight), jnp.zeros_like(weight)
    if len(groups.remembered):
        known = groups.windows > 0
        tried = jnp.where(jnp.any(known, axis=0), weight, 0)
        nearer = jnp.min(jnp.where(known, distance(new[None], groups.remembered), far), axis=0)
        gain = jnp.maximum(nearest - nearer, 0)
    return Scores(
        seen=add(scores.seen, weight),
        error=add(scores.error, compared * error),
        lead=add(scores.lead, compared[None] * lead),
        lead_squared=add(scores.lead_squared, compared[None] * unfused(lead * lead)),
        tried=add(scores.tried, tried),
        nearest=add(scores.nearest, tried * nearest),
        gain=add(scores.gain, tried * gain),
    )
