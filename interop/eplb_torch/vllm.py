"""vLLM: plans for its expert-parallel load balancer.

Set EPLB_TORCH_VLLM=1, or to the name of a strategy, and vLLM's workers load this through the
entry point `vllm.general_plugins`; nothing else is to be done. In Python, `install()` does it.
"""

import os
from typing import ClassVar

import torch

from eplb_jax.packing.strategy import Strategy, resolve
from eplb_torch.eplb import rebalance_experts

VARIABLE = "EPLB_TORCH_VLLM"
"""The environment variable that asks `register` to install: 1, or the name of a strategy."""


class EplbPolicy:
    """The contract of vLLM's `AbstractEplbPolicy`; a subclass sets other values.

    Attributes:
        strategy: How to search: a name from `eplb_jax.STRATEGIES` or a `Strategy`.
        all_maps: Whether to return all three maps, as vLLM's releases did before the policies
            were handed the old map, and not the first alone.
    """

    strategy: ClassVar[str | Strategy] = "auto"
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
                possible stay. Of another shape, as after a change of GPUs, it is not used.

        Returns:
            The expert in every slot, int64 [L, R] on the CPU, or all three maps.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: As `eplb_torch.rebalance_experts`.
        """
        old, shape = old_global_expert_indices, (weight.shape[0], num_replicas)
        previous = old if old is not None and old.shape == shape and old.min() >= 0 else None
        counts = num_replicas, num_groups, num_nodes, num_ranks
        phy2log, *others = rebalance_experts(
            weight, *counts, strategy=cls.strategy, previous=previous
        )
        if not cls.all_maps:
            return phy2log.cpu()
        log2phy, logcnt = others
        return phy2log.cpu(), log2phy.cpu(), logcnt.cpu()


def install(strategy: str | Strategy = "auto") -> None:
    """Take the place of vLLM's default policy in this process.

    What the installed vLLM expects, one map or three, is read off its own policy.

    Raises:
        ImportError: vLLM is missing, or of a release without policies.
        ValueError: The strategy is not known.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # pyright: ignore[reportMissingImports]

    returned = EPLB_POLICIES["default"].rebalance_experts.__annotations__.get("return", "")
    names = {"strategy": resolve(strategy), "all_maps": "tuple" in str(returned).lower()}
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
