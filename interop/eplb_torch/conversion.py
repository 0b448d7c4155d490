"""Tensors to JAX arrays and back, sharing memory through DLPack where possible."""

import contextlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import torch

from eplb_torch.backend import find_device, untraced

_BITS = {1: torch.int8, 2: torch.int16}
_UNSUPPORTED_BY_DLPACK = AssertionError, BufferError, RuntimeError, TypeError, ValueError


@untraced
def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """A JAX array with the values of a tensor, on the same device if JAX has it.

    Without `copy` the array shares the memory of a contiguous tensor where possible, as with
    `jax.numpy.from_dlpack`: do not write to the tensor while the array is in use. Otherwise
    (strided, expanded, misaligned or pinned memory, a device that JAX does not have) it is a copy.
    A CUDA tensor is read in the order of torch's current stream.

    Without x64, JAX has no 64-bit types: float64 becomes float32; 64-bit integers become 32-bit
    integers if all of them fit and float32 otherwise, so large counts do not wrap.

    Args:
        tensor: A dense tensor of a dtype that JAX has. Gradients are not tracked.
        copy: Whether to copy in any case.

    Returns:
        The array, which is on the CPU if JAX does not have the device of the tensor.

    Raises:
        TypeError: It is not a tensor, has no plain memory (meta, fake, sparse, quantised, nested
            and wrapper tensors), or has a dtype that JAX does not have.

    Example:
        >>> to_jax(torch.tensor([[1, 2], [3, 4]]).T)
        Array([[1, 3], [2, 4]], dtype=int32)
    """
    plain = _narrowed(_plain(tensor, "tensor"))
    device = find_device(plain.device.type, plain.device.index or 0)
    if device is None:
        plain, device = plain.cpu(), find_device("cpu", 0)
    plain = plain.contiguous()
    pinned = plain.is_cpu and plain.is_pinned()  # JAX would take it for memory of a GPU
    if pinned or (copy and plain.data_ptr() == tensor.data_ptr()):
        plain = plain.clone(memory_format=torch.contiguous_format)
    # Without the wait JAX may copy after this call returns, when the tensor may have changed.
    with contextlib.suppress(*_UNSUPPORTED_BY_DLPACK):
        return jax.block_until_ready(jnp.from_dlpack(plain))
    return jax.block_until_ready(jax.device_put(np.array(_as_numpy(plain.cpu())), device))


def as_weight(weight: torch.Tensor, device: jax.Device) -> np.ndarray | jax.Array:
    """Loads for a computation on a JAX device; for a CPU, a NumPy view of them.

    `eplb_jax` converts NumPy arrays to float32 on the host, so no count wraps, and a view takes a
    tenth of the time of a DLPack import.
    """
    plain = _plain(weight, "weight")
    if device.platform == "cpu":
        return _as_numpy(plain.cpu())
    if plain.is_complex():
        raise TypeError(f"weight must hold real numbers, got dtype {plain.dtype}")
    return jax.device_put(to_jax(plain.to(torch.float32)), device)


def as_previous(value: Any) -> Any:
    """The plan in place as `eplb_jax` takes it: a tensor becomes a NumPy array."""
    if isinstance(value, torch.Tensor):
        return _as_numpy(_plain(value, "previous").cpu())
    return value


def as_map(array: jax.Array, weight: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """A copy of a map of a plan, or of its first `width` columns, on the device of `weight`.

    On the CPU, NumPy converts to int64: it reads a JAX array in place, takes a fifth of the time,
    and starts no threads, while torch's threads for large tensors compete with JAX's.
    """
    if next(iter(array.devices())).platform != "cpu":
        return to_torch(array, weight)[..., :width].to(torch.int64, copy=True)
    return torch.from_numpy(np.array(np.asarray(array)[..., :width], np.int64)).to(weight.device)


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor detached, resolved and without its subclass, if it has memory to read."""
    if type(tensor) is not torch.Tensor:
        tensor = _without_subclass(tensor, name)
    reason = None
    if tensor.is_nested:
        reason = "it is nested, not rectangular; use to_padded_tensor()"
    elif tensor.is_meta:
        reason = "it is on the meta device and holds no values"
    elif tensor.is_quantized:
        reason = "it is quantised; use dequantize()"
    elif tensor.layout != torch.strided:
        reason = f"its layout is {tensor.layout}; use to_dense()"
    if reason:
        raise TypeError(f"{name} cannot be converted to JAX: {reason}")
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        raise TypeError(f"{name} has no memory to read, as inside torch.func: {error}") from error
    return tensor.detach().resolve_conj().resolve_neg()


def _without_subclass(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dispatches = getattr(type(tensor), "__torch_dispatch__", None)
    if dispatches is not getattr(torch.Tensor, "__torch_dispatch__", None):
        kind = type(tensor).__name__
        raise TypeError(
            f"{name} is a {kind}, which holds no values of its own; pass a plain tensor"
        )
    return tensor.detach().as_subclass(torch.Tensor)


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a 32-bit dtype in place of a 64-bit one, unless JAX uses x64."""
    narrow = {
        torch.float64: torch.float32,
        torch.complex128: torch.complex64,
        torch.int64: torch.int32,
        torch.uint64: torch.uint32,
    }.get(tensor.dtype)
    if narrow is None or jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return tensor
    if narrow in (torch.int32, torch.uint32) and tensor.numel():
        values = tensor.cpu().numpy()
        limits = torch.iinfo(narrow)
        if values.min() < limits.min or values.max() > limits.max:
            narrow = torch.float32
    return tensor.to(narrow)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy view of a CPU tensor, with JAX's dtypes where NumPy has none."""
    with contextlib.suppress(TypeError):
        return tensor.numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(jnp, name):
        raise TypeError(f"JAX has no dtype {name}; convert the tensor first")
    return tensor.view(_BITS[tensor.itemsize]).numpy().view(getattr(jnp, name).dtype)


@untraced
def to_torch(
    array: jax.Array, like: torch.Tensor | torch.device | str | None = None, *, copy: bool = True
) -> torch.Tensor:
    """A tensor with the values of a JAX array.

    The tensor is a copy, since JAX arrays are immutable. With ``copy=False`` it shares the memory
    of the array where possible: do not write to it then, as that changes the array.

    Args:
        array: A concrete array. One sharded over several devices is gathered.
        like: The device of the result, or a tensor on it; None: the device of the array.
        copy: Whether to copy in any case.

    Returns:
        The tensor, of the same dtype.

    Raises:
        TypeError: It is not a JAX array, is traced by `jax.jit`, is a random key, or has a dtype
            that torch does not have.

    Example:
        >>> to_torch(jnp.arange(3))
        tensor([0, 1, 2], dtype=torch.int32)
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError("array is traced inside jax.jit and has no values; return it first")
    if not isinstance(array, jax.Array):
        raise TypeError(f"array must be a jax.Array, got {type(array).__name__}")
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f"torch has no {array.dtype}; for a random key use jax.random.key_data")
    device = like.device if isinstance(like, torch.Tensor) else like
    shared = _shared(jax.block_until_ready(array))
    if shared is None:
        return _from_numpy(np.array(array)).to(device)
    tensor = shared.to(shared.device if device is None else device, copy=copy)
    if shared.is_cuda and tensor is not shared:
        torch.cuda.current_stream(shared.device).synchronize()  # JAX may reuse the memory
    return tensor


def _shared(array: jax.Array) -> torch.Tensor | None:
    """A tensor that shares the memory of the array, or None if DLPack cannot."""
    if len(array.sharding.device_set) > 1:
        return None
    with contextlib.suppress(*_UNSUPPORTED_BY_DLPACK):
        return torch.from_dlpack(array)
    return None


def _from_numpy(values: np.ndarray) -> torch.Tensor:
    """A tensor that takes over the memory of a NumPy array."""
    with contextlib.suppress(TypeError):
        return torch.from_numpy(values)
    name = values.dtype.name
    if name in ("int2", "int4", "uint2", "uint4"):
        return torch.from_numpy(values.astype("uint8" if name[0] == "u" else "int8"))
    dtype = getattr(torch, name, None)
    if dtype is None:
        raise TypeError(f"torch has no dtype {name}")
    return torch.from_numpy(values.view(f"i{values.itemsize}")).view(dtype)
