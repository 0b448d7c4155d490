"""Gathers, ranks, fixed-point numbers and scales: what all other modules index and compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Num

LOAD_BITS = 30
"""Bits of the load of a pack where it stands alone in an int32."""


def index_bits(count: int) -> int:
    """How many bits the indices below `count` take."""
    return max(count - 1, 1).bit_length()


def rows(count: int, like: Array) -> Int32[Array, "count *ones"]:
    """0, 1, ... down the first axis, ready to broadcast against the lanes of `like`."""
    return jnp.arange(count, dtype=jnp.int32).reshape((count,) + (1,) * (like.ndim - 1))


def fixed_point(weight: Float[Array, "..."], capacity: int, bits: int) -> Int32[Array, "..."]:
    """Weights below 2 as integers, so that any `capacity` of them add up to less than 2 ** bits."""
    return (weight * 2.0 ** (bits - 1 - index_bits(capacity))).astype(jnp.int32)


def loads_of(units: Int32[Array, "..."], contents: Int32[Array, "m c *K"]) -> Int32[Array, "m *K"]:
    """The load of every pack, from weights in fixed point."""
    return jnp.sum(look_up(units, contents), axis=1, dtype=jnp.int32)


def ordered_sum(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The sum along an axis, one term after the other: the same in every batch.

    A reduction adds in an order that depends on the shape of the whole array, and float sums on
    that order.
    """
    terms = jnp.moveaxis(x, axis, 0)
    return lax.scan(lambda total, term: (total + term, None), jnp.zeros_like(terms[0]), terms)[0]


def unfused(x: Array) -> Array:
    """`x`, rounded before it is added to anything: no fused multiply-add."""
    return lax.optimization_barrier(x)


def take_rows(table: Array, index: Int32[Array, "..."]) -> Array:
    """``table[index]`` for indices known to be in range."""
    return table.at[index].get(mode="promise_in_bounds")


def look_up(table: Array, index: Int32[Array, "..."]) -> Array:
    """The entries of a table [n] that all lanes share, or of [n, *K] with a column for each."""
    if table.ndim == 1:
        return take_rows(table, index)
    flat = index.reshape(-1, *table.shape[1:])
    return pick(table, flat).reshape(index.shape)


def along(x: Array, index: Int32[Array, "..."], axis: int) -> Array:
    """`jnp.take_along_axis` for indices known to be in range."""
    return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")


def pick(x: Array, index: Int32[Array, "..."]) -> Array:
    """``x[index]`` lane by lane: one row for `index` [*K], s rows of `x` [r, *K] for [s, *K]."""
    if index.ndim == x.ndim:
        return along(x, index, 0)
    return along(x, index.reshape((1,) * (x.ndim - index.ndim) + index.shape), 0)[0]


def first_equal(x: Array, value: jax.Array) -> Int32[Array, "*K"]:
    """The first row where a lane equals `value`: two plain reductions, faster than argmin."""
    return jnp.min(jnp.where(x == value[None], rows(x.shape[0], x), x.shape[0] - 1), axis=0)


def least_row(
    x: Num[Array, "r *K"], beside: Int32[Array, "r *K"], limit: Num[Array, "*K"]
) -> tuple[Num[Array, "*K"], Int32[Array, "*K"], Int32[Array, "*K"]]:
    """The minimum of every lane, its first row, and the entry of `beside` in that row.

    The limit, -1 and -1 where no row is below the limit. Half of the rows are one kernel, run
    twice: on XLA:CPU that is faster than two reductions, and the inputs and results of a loop are
    stored, not recomputed by every reader.
    """

    def compare(i: Array | int, least: tuple[Array, ...]) -> tuple[Array, ...]:
        row = x[i], i, beside[i]
        lower = x[i] < least[0]
        return tuple(jnp.where(lower, new, old) for new, old in zip(row, least, strict=True))

    count = x.shape[0]
    unroll = max(min(count // 2, 16), 1)
    none = jnp.full(limit.shape, -1, jnp.int32)
    least = limit, none, none
    for i in range(count % unroll):
        least = compare(i, least)
    return lax.fori_loop(count % unroll, count, compare, least, unroll=unroll)


_FEW = 64
"""Up to this many values XLA:CPU is faster if it sums over the last axis, beyond over the first."""


def ranks(value: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """The rank of every value, largest first, the lower index first among equals."""
    index = jnp.arange(value.shape[0], dtype=jnp.int32)
    first, last = (None, slice(None)), (slice(None), None)
    mine, others = (first, last) if value.shape[0] > _FEW else (last, first)
    before = value[others] > value[mine]
    before |= (value[others] == value[mine]) & (index[others] < index[mine])
    return jnp.sum(before, axis=others.index(slice(None)), dtype=jnp.int32)


def descending(value: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """The indices by descending value, the lower index first among equals."""
    return positions_of(jnp.arange(value.shape[0], dtype=jnp.int32), ranks(value))


def positions_of(wanted: Int32[Array, " k"], among: Int32[Array, " m"]) -> Int32[Array, " k"]:
    """The position of every wanted number among distinct ones."""
    index = jnp.arange(among.shape[0], dtype=jnp.int32)
    found = jnp.where(wanted[None] == among[:, None], index[:, None], 0)
    return jnp.sum(found, axis=0, dtype=jnp.int32)


def sanitise(load: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Loads with a defined meaning whatever they hold, scaled so that no sum overflows.

    Inside `jax.jit`, where values cannot be checked, NaN and negative loads count as zero and
    infinite ones as the largest float32.
    """
    finite = jnp.nan_to_num(jnp.maximum(load, 0), posinf=float(np.finfo(np.float32).max))
    return normalise(jnp.abs(finite), -1)


def normalise(load: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """Loads divided by a power of two, which is exact, so that the largest along `axis` is below 4.

    It is at least 1, and below 2 where it was below 2^127.
    """
    largest = jnp.max(load, axis=axis, keepdims=True, initial=0)
    exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    # XLA multiplies by the inverse, and the inverse of 2^127 is subnormal, hence zero.
    power = jnp.minimum(lax.bitcast_convert_type(exponent, jnp.float32), 2.0**126)
    return load / jnp.where(power > 0, power, 1)


def relative(load: Float[Array, "L E"]) -> Float[Array, "L E"]:
    """Every layer divided by its largest load: the same whatever the unit."""
    largest = jnp.max(load, axis=-1, keepdims=True, initial=0)
    return load / jnp.where(largest > 0, largest, 1)
