"""Tensors to JAX arrays and back: memory is shared through DLPack where both sides allow it."""

import contextlib

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
    """A JAX array of what the tensor holds, on its device where JAX has that device.

    Without `copy` the array shares the memory of a contiguous tensor where it can, as
    `jax.numpy.from_dlpack` does: do not write to the tensor while the array is in use. Where it
    cannot (strided, expanded or misaligned memory, pinned memory, a device that JAX does not
    have) the array is a copy. A CUDA tensor goes over in the order of torch's current stream.

    Without x64 JAX has no 64-bit numbers: float64 becomes float32, and integers become 32-bit
    ones where all of them fit and float32 where not, so that large counts do not wrap.

    Args:
        tensor: Any dense tensor with a number type that JAX has; gradients are not followed.
        copy: Whether the array has memory of its own.

    Raises:
        TypeError: Not a tensor, or one without plain memory: on the meta device, fake, sparse,
            quantised, nested, a wrapper of others, or of a number type that JAX does not have.

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
    # What JAX copies it copies later, unless waited for: the caller may write to the tensor then.
    with contextlib.suppress(*_UNSUPPORTED_BY_DLPACK):
        return jax.block_until_ready(jnp.from_dlpack(plain))
    return jax.block_until_ready(jax.device_put(np.array(_as_numpy(plain.cpu())), device))


def load_for(device: jax.Device, weight: torch.Tensor) -> np.ndarray | jax.Array:
    """Loads for a computation on a JAX device; on a CPU, a NumPy view of them.

    `eplb_jax` makes NumPy's numbers float32 before JAX sees them, so that no count wraps, and a
    view costs a tenth of a DLPack import.
    """
    plain = _plain(weight, "weight")
    if device.platform == "cpu":
        return _as_numpy(plain.cpu())
    if plain.is_complex():
        raise TypeError(f"weight must hold real numbers, got dtype {plain.dtype}")
    return jax.device_put(to_jax(plain.to(torch.float32)), device)


def map_for(weight: torch.Tensor, array: jax.Array) -> torch.Tensor:
    """A map of a plan as int64 on the device of `weight`, in memory of its own.

    NumPy converts what lies on a CPU: it reads a JAX array in place, in a fifth of the time, and
    starts no threads as torch does for large tensors, which go on spinning beside JAX's.
    """
    if next(iter(array.devices())).platform != "cpu":
        return to_torch(array, weight).to(torch.int64)
    return torch.from_numpy(np.array(array, np.int64)).to(weight.device)


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The tensor without gradients, lazy signs or a subclass, if it has memory to read."""
    if type(tensor) is not torch.Tensor:
        tensor = _without_subclass(tensor, name)
    reason = None
    if tensor.is_nested:
        reason = "it is nested, hence not rectangular; use to_padded_tensor()"
    elif tensor.is_meta:
        reason = "it is on the meta device and holds no values"
    elif tensor.is_quantized:
        reason = "it is quantised; use dequantize()"
    elif tensor.layout != torch.strided:
        reason = f"its layout is {tensor.layout}; use to_dense()"
    if reason:
        raise TypeError(f"{name} cannot be handed to JAX: {reason}")
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
            f"{name} is a {kind}, which holds no values of its own; hand over a plain tensor"
        )
    return tensor.detach().as_subclass(torch.Tensor)


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Without x64, 64-bit numbers in torch's own 32-bit ones, lest JAX wrap them."""
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
    """The values in NumPy, in JAX's own types where NumPy has none."""
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
    """A tensor of what the array holds.

    A JAX array is immutable and a tensor is not, so the tensor has memory of its own. With
    ``copy=False`` it shares the array's where it can: only read it then, as what is written
    to it changes the array and all that shares its memory.

    Args:
        array: A concrete array; one that is sharded over several devices is gathered.
        like: On the device of this tensor, or on this device; None: where the array is.
        copy: Whether the tensor has memory of its own.

    Raises:
        TypeError: Not a JAX array, one inside `jax.jit`, a random key, or of a type
            that torch does not have.

    Example:
        >>> to_torch(jnp.arange(3))
        tensor([0, 1, 2], dtype=torch.int32)
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError("a value inside jax.jit cannot become a tensor; return it first")
    if not isinstance(array, jax.Array):
        raise TypeError(f"expected a jax.Array, got {type(array).__name__}")
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f"torch has no {array.dtype}; for a random key use jax.random.key_data")
    device = like.device if isinstance(like, torch.Tensor) else like
    shared = _shared(jax.block_until_ready(array))
    if shared is None:
        return _from_numpy(np.array(array)).to(device)
    tensor = shared.to(shared.device if device is None else device, copy=copy)
    if shared.is_cuda and tensor is not shared:
        torch.cuda.current_stream(shared.device).synchronize()  # JAX may use its memory again
    return tensor


def _shared(array: jax.Array) -> torch.Tensor | None:
    """A tensor on the memory of the array, where DLPack can say so."""
    if len(array.sharding.device_set) > 1:
        return None
    with contextlib.suppress(*_UNSUPPORTED_BY_DLPACK):
        return torch.from_dlpack(array)
    return None


def _from_numpy(values: np.ndarray) -> torch.Tensor:
    """A tensor on the memory of a NumPy array, which is not shared with anything."""
    with contextlib.suppress(TypeError):
        return torch.from_numpy(values)
    name = values.dtype.name
    if name in ("int2", "int4", "uint2", "uint4"):
        return torch.from_numpy(values.astype("uint8" if name[0] == "u" else "int8"))
    dtype = getattr(torch, name, None)
    if dtype is None:
        raise TypeError(f"torch has no dtype {name}")
    return torch.from_numpy(values.view(f"i{values.itemsize}")).view(dtype)
