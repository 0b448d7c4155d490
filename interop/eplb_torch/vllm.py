"""vLLM: plans for its expert-parallel load balancer.

With EPLB_TORCH_VLLM=1, or set to the name of a strategy, vLLM's workers load this module through
the entry point `vllm.general_plugins`. In Python, call `install()`.
"""

import os
from typing import ClassVar

import numpy as np
import torch

from eplb_jax import Strategy, resolve_strategy
from eplb_torch.conversion import as_previous
from eplb_torch.eplb import rebalance_experts

VARIABLE = "EPLB_TORCH_VLLM"
"""The environment variable that `register` reads: 1, or the name of a strategy."""


class EplbPolicy:
    """An implementation of vLLM's `AbstractEplbPolicy`. Subclasses may set other values.

    Attributes:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU;
            None: no limit.
        all_maps: Whether to return all three maps, as older vLLM releases expect, whose policies
            do not get the old map.
    """

    strategy: ClassVar[str | Strategy] = "auto"
    max_moves: ClassVar[int | None] = None
    all_maps: ClassVar[bool] = False

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Plan from a measured load. Thread-safe.

        Args:
            weight: [L, E] loads in any unit.
            num_replicas: R, physical slots of a layer; a multiple of num_ranks.
            num_groups: Groups of consecutive experts; divides E.
            num_nodes: N; divides num_ranks.
            num_ranks: GPUs, over all nodes.
            old_global_expert_indices: [L, R], the expert in every slot of the plan in place, which
                the new plan stays close to. It is ignored if it has another shape or lacks an
                expert, as after a change of GPUs.

        Returns:
            The expert in every slot, int64 [L, R] on the CPU, or all three maps.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: As `eplb_torch.rebalance_experts`.
        """
        old, counts = old_global_expert_indices, (num_replicas, num_groups, num_nodes, num_ranks)
        kept = {}
        if old is not None:
            in_place = np.asarray(as_previous(old))
            if _is_complete(in_place, (weight.shape[0], num_replicas), weight.shape[1]):
                kept = {"previous": in_place, "max_moves": cls.max_moves}
        phy2log, *others = rebalance_experts(weight, *counts, strategy=cls.strategy, **kept)
        if not cls.all_maps:
            return phy2log.cpu()
        log2phy, logcnt = others
        return phy2log.cpu(), log2phy.cpu(), logcnt.cpu()


def _is_complete(old: np.ndarray, shape: tuple[int, int], num_experts: int) -> bool:
    """Whether a map has this shape and, in every layer, a slot for every expert."""
    if old.shape != shape or not np.all((old >= 0) & (old < num_experts)):
        return False
    held = np.zeros((shape[0], num_experts), bool)
    held[np.arange(shape[0])[:, None], old.astype(np.intp)] = True
    return bool(held.all())


def install(strategy: str | Strategy = "auto", max_moves: int | None = None) -> None:
    """Replace vLLM's default policy in this process.

    Whether the installed vLLM expects one map or three is read from the annotations of its policy.

    Args:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU;
            None: no limit.

    Raises:
        ImportError: vLLM is not installed, or is a release without policies.
        TypeError: `max_moves` is not a whole number.
        ValueError: The strategy is not known, or `max_moves` is negative.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # pyright: ignore[reportMissingImports]

    if max_moves is not None:
        if not hasattr(max_moves, "__index__"):
            raise TypeError(f"max_moves must be a whole number, got {max_moves!r}")
        if max_moves < 0:
            raise ValueError(f"max_moves={max_moves} is negative; nearest: 0")
    current = EPLB_POLICIES["default"]
    returned = current.rebalance_experts.__annotations__.get("return", "")
    names = {
        "strategy": resolve_strategy(strategy),
        "max_moves": max_moves,
        "all_maps": getattr(current, "all_maps", "tuple" in str(returned).lower()),
    }
    EPLB_POLICIES["default"] = type("EplbPolicy", (EplbPolicy,), names)


def register() -> None:
    """Call `install` if the environment variable is set: the entry point for vLLM.

    Raises:
        ValueError: The variable is not the name of a strategy.
    """
    wanted = os.environ.get(VARIABLE, "0")
    if wanted not in ("", "0"):
        try:
            install("auto" if wanted == "1" else wanted)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}={wanted}: {error}") from error
