"""Checks of arguments. Every error names the argument, what was got and the nearest valid value."""

import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int32, Key
from numpy.typing import ArrayLike

LoadLike = ArrayLike | Array
"""What public functions take as loads: anything `jnp.asarray` takes, nested lists too."""

LOAD_AXES = ("window", "layer", "expert")


def as_load(
    value: LoadLike,
    name: str,
    axes: Sequence[str] = LOAD_AXES,
    *,
    least_axes: int = 1,
    check: bool = True,
) -> Float[Array, "..."] | Float[np.ndarray, "..."]:
    """A float32 array of loads whose shape is all of `axes` or the last ones.

    64-bit counts become float32 before JAX, which would wrap them, sees them. Values are checked
    where the array is concrete, on the host if it is there; inside a trace `sanitise` gives them
    a defined meaning.

    Args:
        value: The loads.
        name: Name of the argument, for errors.
        axes: What the axes are called.
        least_axes: How many of them there must be at least.
        check: Whether to check values, which waits for the device of a JAX array.

    Raises:
        TypeError: It holds no real numbers.
        ValueError: It has another number of axes or no items, or a load is NaN, infinite or
            negative.
    """
    array = value if isinstance(value, jax.Array) else _to_numpy(value, name)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (np.floating, np.integer, np.bool_)):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    named = axes[len(axes) - array.ndim :]
    empty = array.ndim and (array.shape[-1] == 0 or (named[:1] == ("window",) and len(array) == 0))
    if not least_axes <= array.ndim <= len(axes) or empty:
        shapes = [axes[len(axes) - k :] for k in range(least_axes, len(axes) + 1)]
        wanted = " or ".join("[" + ", ".join(f"{x}s" for x in shape) + "]" for shape in shapes)
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    with np.errstate(over="ignore"):
        load = array.astype(np.float32)
    if not check or isinstance(load, Tracer):
        return load
    valid = _valid(load).all() if isinstance(load, np.ndarray) else _all_valid(load)
    if not jax.device_get(valid):
        if not is_concrete(load):
            raise ValueError(f"{name} holds loads that are NaN, infinite or negative")
        bad = np.asarray(jax.device_get(load))
        place = tuple(np.argwhere(~_valid(bad))[0])
        where = ", ".join(f"{axis} {i}" for axis, i in zip(named, place, strict=True))
        raise ValueError(
            f"{name} at {where} is {bad[place]}; loads must be finite and not negative"
        )
    return load


def as_labels(value: ArrayLike | Array, shape: tuple[int, ...]) -> Int32[Array, "L n"]:
    """An int32 array of labels; only which of them are equal matters.

    Raises:
        TypeError: They are not integers.
        ValueError: The shape is another, or a number does not fit in 32 bits.
    """
    array = value if isinstance(value, jax.Array) else _to_numpy(value, "labels")
    if not jnp.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels must be integers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"labels must have the shape of the weights, {shape}, got {array.shape}")
    if isinstance(array, np.ndarray) and array.size:
        limits = np.iinfo(np.int32)
        if array.min() < limits.min or array.max() > limits.max:
            worst = array.max() if array.max() > limits.max else array.min()
            raise ValueError(f"labels must fit in 32 bits, got {worst}; nearest: {limits.max}")
    return jnp.asarray(array, jnp.int32)


def as_experts(
    value: Any,
    name: str,
    shape: tuple[int, ...] | None = None,
    num_experts: int | None = None,
) -> Int32[Array, "*L R"]:
    """The expert in every slot, of a plan or of any map like its phy2log.

    Raises:
        TypeError: It does not hold integers.
        ValueError: It has another shape, or is concrete and holds a number that is no expert.
    """
    value = getattr(value, "phy2log", value)
    array = value if isinstance(value, jax.Array) else _to_numpy(value, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.ndim not in (1, 2) or (shape is not None and array.shape != shape):
        wanted = "[layers, slots] or [slots]" if shape is None else f"{shape}"
        raise ValueError(f"{name} must have the shape {wanted}, got {array.shape}")
    if is_concrete(array):
        experts = np.asarray(array)
        most = np.iinfo(np.int32).max if num_experts is None else num_experts - 1
        for where in np.argwhere((experts < -1) | (experts > most))[:1]:
            layer = f"layer {where[0]}, " if array.ndim == 2 else ""
            raise ValueError(
                f"{name} at {layer}slot {where[-1]} is {experts[tuple(where)]}; "
                f"experts are numbered 0 to {most}, and -1 is none"
            )
    return jnp.asarray(array, jnp.int32)


def is_concrete(array: Array | np.ndarray) -> bool:
    """Whether values are known and addressable here: not in a trace, not on other hosts alone."""
    if isinstance(array, Tracer):
        return False
    return isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated


def check_complete(experts: Int32[Array, "*L R"], num_experts: int, name: str) -> None:
    """Raise ValueError if a layer has no slot for an expert, where the map is concrete."""
    if not is_concrete(experts):
        return
    by_layer = np.asarray(experts).reshape(-1, experts.shape[-1])
    held = np.zeros((len(by_layer), num_experts + 1), bool)  # the last one counts -1
    held[np.arange(len(by_layer))[:, None], by_layer] = True
    for layer, expert in np.argwhere(~held[:, :-1])[:1]:
        where = f" in layer {layer}" if experts.ndim > 1 else ""
        raise ValueError(f"{name} has no slot for expert {expert}{where}")


def _to_numpy(value: LoadLike, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array: {error}") from error


@jax.jit
def _all_valid(load: Array) -> Array:
    return jnp.all(_valid(load))


def _valid(load: Any) -> Any:
    return (load >= 0) & (load < np.inf)


def as_count(name: str, value: SupportsIndex, least: int = 1) -> int:
    """An integer of at least 1, or `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name}={count} is less than {least}; nearest: {least}")
    return count


def as_number(name: str, value: SupportsFloat) -> float:
    """Any number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None


def as_amount(name: str, value: SupportsFloat) -> float:
    """A finite, nonnegative number."""
    number = as_number(name, value)
    if not 0 <= number <= np.finfo(np.float32).max:
        raise ValueError(f"{name}={number} must be finite and not negative; nearest: 0")
    return number


def as_limit(name: str, value: SupportsIndex | Array) -> Int32[Array, ""]:
    """`as_count` from 0 as an int32; a traced value is not checked."""
    if not isinstance(value, Tracer):
        value = min(as_count(name, value, least=0), np.iinfo(np.int32).max)
    return jnp.asarray(value, jnp.int32)


def as_penalty(name: str, value: float | Array) -> Float[Array, ""]:
    """`as_amount` as a float32; a traced value is not checked."""
    return jnp.asarray(value if isinstance(value, Tracer) else as_amount(name, value), jnp.float32)


def check_divides(
    name: str, value: int, total_name: str, total: int, otherwise: str | None = None
) -> None:
    """`value` must divide `total`; the error names the nearest numbers that do, or another way."""
    if total % value:
        below = next(d for d in range(min(value, total), 0, -1) if total % d == 0)
        above = next((d for d in range(value, total + 1) if total % d == 0), None)
        nearest = _either(below, above) + (f", or {otherwise}" if otherwise else "")
        raise ValueError(f"{name}={value} does not divide {total_name}={total}; nearest: {nearest}")


def check_multiple(name: str, value: int, unit_name: str, unit: int, least: int = 1) -> None:
    """`value` must be a multiple of `unit` and at least `least`."""
    floor = -(-least // unit) * unit
    if value < least:
        raise ValueError(f"{name}={value} is less than {least}; nearest: {floor}")
    if value % unit:
        below = value // unit * unit
        raise ValueError(
            f"{name}={value} is not a multiple of {unit_name}={unit}; "
            f"nearest: {_either(below if below >= floor else None, below + unit)}"
        )


def _either(below: int | None, above: int | None) -> str:
    return ", ".join(str(x) for x in (below, above) if x is not None)


def as_key(key: Key[Array, ""] | None) -> Key[Array, ""] | None:
    """A typed random key, or None as it is."""
    if key is None:
        return None
    if not isinstance(key, jax.Array):
        raise TypeError(f"key must be a JAX random key, got {key!r}; make one: jax.random.key(0)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fixed_if_none(key: Key[Array, ""] | None) -> Key[Array, ""]:
    """The key given, or the fixed one. Called inside `jit`, where making a key costs nothing."""
    return jax.random.key(0) if key is None else key
