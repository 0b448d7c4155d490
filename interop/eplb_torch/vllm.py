"""vLLM: plans for its expert-parallel load balancer.

Set EPLB_TORCH_VLLM=1, or to the name of a strategy, and vLLM's workers load this through the
entry point `vllm.general_plugins`; nothing else is to be done. In Python, `install()` does it.
"""

import os
from typing import ClassVar

import torch

from eplb_jax.checks import as_limit, lacking
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_torch.eplb import rebalance_experts

VARIABLE = "EPLB_TORCH_VLLM"
"""The environment variable that asks `register` to install: 1, or the name of a strategy."""


class EplbPolicy:
    """The contract of vLLM's `AbstractEplbPolicy`; a subclass sets other values.

    Attributes:
        strategy: How to search: a name from `eplb_jax.STRATEGIES` or a `Strategy`.
        max_moves: At most so many slots of a layer fetch their expert from another GPU; None: no
            limit.
        all_maps: Whether to return all three maps, as vLLM's releases did before the policies
            were handed the old map, and not the first alone.
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
        """Plan from a measured load; safe in any thread.

        Args:
            weight: [L, E] loads in any unit.
            num_replicas: R, physical slots of a layer; a multiple of num_ranks.
            num_groups: Groups of consecutive experts; divides E.
            num_nodes: N; divides num_ranks.
            num_ranks: GPUs, over all nodes.
            old_global_expert_indices: [L, R], the expert in every slot until now: as many as
                possible stay. Of another shape or without some expert, as after a change of GPUs,
                it is not used.

        Returns:
            The expert in every slot, int64 [L, R] on the CPU, or all three maps.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: As `eplb_torch.rebalance_experts`.
        """
        old, counts = old_global_expert_indices, (num_replicas, num_groups, num_nodes, num_ranks)
        kept = {}
        if old is not None and _is_whole(old, (weight.shape[0], num_replicas), weight.shape[1]):
            kept = {"previous": old, "max_moves": cls.max_moves}
        phy2log, *others = rebalance_experts(weight, *counts, strategy=cls.strategy, **kept)
        if not cls.all_maps:
            return phy2log.cpu()
        log2phy, logcnt = others
        return phy2log.cpu(), log2phy.cpu(), logcnt.cpu()


def _is_whole(old: torch.Tensor, shape: tuple[int, int], num_experts: int) -> bool:
    """Whether it is a map of this shape with a slot for every expert."""
    if old.shape != shape or old.min() < 0 or old.max() >= num_experts:
        return False
    return not len(lacking(old.cpu().numpy(), num_experts))


def install(strategy: str | Strategy = "auto", max_moves: int | None = None) -> None:
    """Take the place of vLLM's default policy in this process.

    A plan with `max_moves` fetches at most so many slots of a layer from other GPUs. What the
    installed vLLM expects, one map or three, is read off its own policy.

    Raises:
        ImportError: vLLM is missing, or of a release without policies.
        TypeError: `max_moves` is not a whole number.
        ValueError: The strategy is not known, or `max_moves` is negative.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # pyright: ignore[reportMissingImports]

    current = EPLB_POLICIES["default"]
    returned = current.rebalance_experts.__annotations__.get("return", "")
    names = {
        "strategy": resolve_strategy(strategy),
        "max_moves": None if max_moves is None else int(as_limit("max_moves", max_moves)),
        "all_maps": getattr(current, "all_maps", "tuple" in str(returned).lower()),
    }
    EPLB_POLICIES["default"] = type("EplbPolicy", (EplbPolicy,), names)


def register() -> None:
    """The entry point: `install` if the environment variable asks for it.

    Raises:
        ValueError: The variable names no strategy.
    """
    wanted = os.environ.get(VARIABLE, "0")
    if wanted not in ("", "0"):
        try:
            install("auto" if wanted == "1" else wanted)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}={wanted}: {error}") from error
