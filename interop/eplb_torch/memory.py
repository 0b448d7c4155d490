"""What the plug-ins for engines share: options of the environment, and memory between calls."""

import os
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

import eplb_jax
from eplb_jax import TOLERANCE, History, Strategy, resolve_strategy
from eplb_torch.backend import compute_device
from eplb_torch.conversion import as_weight

VARIABLES = {
    "strategy": "EPLB_TORCH_STRATEGY",
    "tolerance": "EPLB_TORCH_TOLERANCE",
    "max_moves": "EPLB_TORCH_MAX_MOVES",
    "move_penalty": "EPLB_TORCH_MOVE_PENALTY",
    "remember": "EPLB_TORCH_REMEMBER",
}
"""The environment variable of every option."""


@dataclass(frozen=True)
class Options:
    """How a plug-in plans.

    Attributes:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        tolerance: As of `eplb_jax.plan`; None: a new plan in every call.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU;
            None: no limit.
        move_penalty: Imbalance that a move must gain; None: 0.
        remember: Whether to plan for all windows seen so far, not for the last one alone.
    """

    strategy: str | Strategy = "auto"
    tolerance: float | None = TOLERANCE
    max_moves: int | None = None
    move_penalty: float | None = None
    remember: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        resolve_strategy(self.strategy)
        if self.max_moves is not None:
            if not hasattr(self.max_moves, "__index__"):
                raise TypeError(f"max_moves must be a whole number, got {self.max_moves!r}")
            if self.max_moves < 0:
                raise ValueError(f"max_moves={self.max_moves} is negative; nearest: 0")
        for name in ("tolerance", "move_penalty"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative; nearest: 0")

    @property
    def limits(self) -> dict[str, Any]:
        """The arguments of a plan that start from the one in place."""
        limits = {"max_moves": self.max_moves, "move_penalty": self.move_penalty}
        return {"tolerance": self.tolerance} | (limits if self.tolerance is not None else {})


def options_of_environment(environment: Mapping[str, str] = os.environ) -> Options:
    """The options that the environment asks for, defaults for the rest.

    Raises:
        ValueError: A variable holds what is no value of its option.
    """
    read = {
        "strategy": str,
        "tolerance": lambda x: None if x == "none" else float(x),
        "max_moves": int,
        "move_penalty": float,
        "remember": lambda x: {"0": False, "1": True}[x],
    }
    values: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        text = environment.get(variable, "")
        if text:
            try:
                values[name] = read[name](text)
                Options(**{name: values[name]})
            except (KeyError, ValueError) as error:
                raise ValueError(f"{variable}={text} is no {name}: {error}") from error
    return Options(**values)


def install_if_asked(variable: str, install: Callable[[str | None], None]) -> None:
    """Call `install` with a strategy, or None for 1, if the environment variable is set.

    Raises:
        ValueError: The variable is not the name of a strategy.
    """
    wanted = os.environ.get(variable, "0")
    if wanted not in ("", "0"):
        try:
            install(None if wanted == "1" else wanted)
        except ValueError as error:
            raise ValueError(f"{variable}={wanted}: {error}") from error


class Memory:
    """Histories of the loads of a process, and the last plans; thread-safe.

    One for each key, a shape of loads. When the key of a shape changes, as it does when GPUs come
    or go, its history begins anew: a rank that has just joined knows nothing, and all ranks must
    make the same plan.
    """

    def __init__(self) -> None:
        """Nothing seen."""
        self._lock = threading.Lock()
        self._seen: dict[tuple[int, int], tuple[Hashable, History]] = {}
        self._plans: dict[Hashable, torch.Tensor] = {}

    def observe(self, load: torch.Tensor, key: Hashable) -> History:
        """The history after one more window, [L, E], or several, [T, L, E].

        Raises:
            TypeError: It holds no real numbers.
            ValueError: It has another shape, or a load is NaN, infinite or negative.
        """
        device = compute_device(None)
        windows = np.asarray(as_weight(load, device))
        windows = windows[None] if windows.ndim == 2 else windows
        if windows.ndim != 3:
            raise ValueError(f"load must be [L, E] or [T, L, E], got the shape {load.shape}")
        shape = windows.shape[1], windows.shape[2]
        with self._lock:
            known, history = self._seen.get(shape, (None, None))
            if history is None or known != key:
                history = eplb_jax.init_history(*shape)
            with jax.default_device(device):
                for window in windows:
                    history = eplb_jax.update_history(history, window)
            self._seen[shape] = key, history
            return history

    def last_plan(self, key: Hashable) -> torch.Tensor | None:
        """The map that was kept last."""
        with self._lock:
            return self._plans.get(key)

    def keep_plan(self, key: Hashable, phy2log: torch.Tensor) -> None:
        """Keep a map that was returned."""
        with self._lock:
            self._plans[key] = phy2log
