"""The JAX device that plans are computed on, and the start of JAX's backend beside torch."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import torch

_GPU_MEMORY_VARIABLES = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)

P = ParamSpec("P")
T = TypeVar("T")

_forked_after_start = False


def _after_fork() -> None:
    global _forked_after_start
    with contextlib.suppress(ImportError):
        from jax._src.xla_bridge import backends_are_initialized  # there is no public one

        _forked_after_start = backends_are_initialized()


os.register_at_fork(after_in_child=_after_fork)


def compute_device(device: "str | torch.device | jax.Device | None") -> jax.Device:
    """The JAX device of this name; None: the CPU, or JAX's default device if it has no CPU.

    Raises:
        RuntimeError: As `find_device`.
        ValueError: JAX has no such device.
    """
    _check_fork()
    if isinstance(device, jax.Device):
        return device
    if device is None:
        return find_device("cpu", 0) or jax.local_devices()[0]
    platform, _, index = str(device).partition(":")
    found = find_device(platform, int(index or 0)) if index.isdigit() or not index else None
    if found is None:
        known = ", ".join(f"{d.platform}:{d.local_hardware_id or 0}" for d in jax.local_devices())
        raise ValueError(f"device={str(device)!r} is not known to JAX; choose one of: {known}")
    return found


def find_device(platform: str, index: int) -> jax.Device | None:
    """JAX's device for a torch device, or None. All CPU devices of JAX are torch's "cpu:0".

    Raises:
        RuntimeError: The process was forked after JAX's backend had started in its parent.
    """
    _check_fork()
    _start_backend()
    if platform == "cuda" and torch.version.hip:
        platform = "rocm"
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError:
        return None
    if platform == "cpu":
        return devices[0] if index == 0 else None
    return next((d for d in devices if d.local_hardware_id == index), None)


def _check_fork() -> None:
    if _forked_after_start:
        raise RuntimeError(
            "this process was forked after JAX had started in its parent, and a JAX call would "
            "hang; start workers with 'spawn', or fork before the first JAX call of the parent"
        )


@functools.cache
def _start_backend() -> None:
    """Start JAX's backend so that it allocates GPU memory on demand.

    By default JAX reserves three quarters of every GPU when its backend starts, which leaves
    too little for torch. Nothing changes if torch has no GPU support, if the environment sets
    JAX's share of the memory, or if the backend has started already.
    """
    gpus = torch.version.cuda or torch.version.hip
    if not gpus or any(name in os.environ for name in _GPU_MEMORY_VARIABLES):
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        jax.local_devices()
    finally:
        os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run eagerly under `torch.compile`, which breaks its graph there.

    As `torch.compiler.disable`, but that imports torch._dynamo, which takes longer than torch
    itself; here the import is delayed until something is compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore
        return function(*args, **kwargs)

    return call
