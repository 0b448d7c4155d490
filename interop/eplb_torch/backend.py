"""The JAX device that plans are computed on, and how JAX's backend starts beside torch."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import torch

_GPU_MEMORY_IS_SET_BY = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)

P = ParamSpec("P")
T = TypeVar("T")

_lost_in_fork = False


def _after_fork() -> None:
    global _lost_in_fork
    with contextlib.suppress(ImportError):
        from jax._src.xla_bridge import backends_are_initialized  # no public function says so

        _lost_in_fork = backends_are_initialized()


os.register_at_fork(after_in_child=_after_fork)


def compute_device(device: "str | torch.device | jax.Device | None") -> jax.Device:
    """The JAX device that is meant; None is the CPU, or JAX's default device if it has no CPU.

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
        raise ValueError(f"device={str(device)!r} is not one that JAX has here; it has: {known}")
    return found


def find_device(platform: str, index: int) -> jax.Device | None:
    """JAX's device for torch's; a CPU is one device whatever JAX splits it into.

    Raises:
        RuntimeError: The process was forked from one in which JAX's backend ran already.
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
    if _lost_in_fork:
        raise RuntimeError(
            "this process was forked after JAX had started in its parent, so that a JAX call would "
            "never return; start workers by 'spawn', or call JAX in the parent only after forking"
        )


@functools.cache
def _start_backend() -> None:
    """Start JAX's backend so that it takes GPU memory as it needs it.

    By default JAX reserves three quarters of every GPU when its backend starts, which leaves
    too little to torch. Nothing is changed if torch cannot use GPUs, if the environment says how
    much JAX may take, or if the backend runs already.
    """
    gpus = torch.version.cuda or torch.version.hip
    if not gpus or any(name in os.environ for name in _GPU_MEMORY_IS_SET_BY):
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    try:
        jax.local_devices()
    finally:
        os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Under `torch.compile` a break of the graph, where the function runs as it is.

    What `torch.compiler.disable` does, but its import, which takes longer than torch's own,
    waits until something is compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)  # pyright: ignore
        return function(*args, **kwargs)

    return call
