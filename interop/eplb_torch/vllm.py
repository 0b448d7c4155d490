"""vLLM: plans for its expert-parallel load balancer.

With EPLB_TORCH_VLLM=1, or set to the name of a strategy, vLLM's workers load this module through
the entry point `vllm.general_plugins`. In Python, call `install()`. Other options are environment
variables: see `eplb_torch.memory`.
"""

import dataclasses
import logging
from typing import Any, ClassVar

import torch

from eplb_jax import Strategy
from eplb_torch.eplb import rebalance_experts
from eplb_torch.memory import Memory, Options, install_if_asked, options_of_environment

VARIABLE = "EPLB_TORCH_VLLM"
"""The environment variable that `register` reads: 1, or the name of a strategy."""

_logger = logging.getLogger(__name__)


class EplbPolicy:
    """An implementation of vLLM's `AbstractEplbPolicy`. Subclasses may set other values.

    Attributes:
        strategy: As of `eplb_torch.memory.Options`, and so are the next four.
        tolerance: How much worse than a new plan the next one may be.
        max_moves: Limit of moves per layer.
        move_penalty: Imbalance that a move must gain.
        remember: Whether to plan for all windows seen so far. `install` turns it on.
        memory: What was seen in earlier calls; every class that `install` makes has its own.
        all_maps: Whether to return all three maps, as older vLLM releases expect, whose policies
            do not get the old map.
    """

    strategy: ClassVar[str | Strategy] = Options.strategy
    tolerance: ClassVar[float | None] = Options.tolerance
    max_moves: ClassVar[int | None] = Options.max_moves
    move_penalty: ClassVar[float | None] = Options.move_penalty
    remember: ClassVar[bool] = False
    memory: ClassVar[Memory] = Memory()
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
            old_global_expert_indices: [L, R'], the expert in every slot of the plan in place, -1 in
                new slots; with more or fewer ranks than num_ranks, the first ones stay. The new
                plan starts from it.

        Returns:
            The expert in every slot, int64 [L, R] on the CPU, or all three maps. Where no plan can
            be made of the load, such as one with NaN, that is logged and the old map returned.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: There is no plan of these sizes, or none can be made and there is no
                old map to keep.
        """
        counts = num_replicas, num_groups, num_nodes, num_ranks
        options = Options(**{x.name: getattr(cls, x.name) for x in dataclasses.fields(Options)})
        old = old_global_expert_indices
        kept: dict[str, Any] = {} if old is None else {"previous": old, **options.limits}
        try:
            seen = cls.memory.observe(weight, counts) if options.remember else weight
            maps = rebalance_experts(seen, *counts, strategy=options.strategy, **kept)
        except ValueError as error:
            if old is None or weight.ndim != 2:
                raise
            _logger.warning("no plan was made, the old map stays: %s", error)
            nothing = torch.zeros(weight.shape, device="cpu")
            maps = rebalance_experts(nothing, *counts, previous=old, max_moves=0)
        phy2log, log2phy, logcnt = maps
        if not cls.all_maps:
            return phy2log.cpu()
        return phy2log.cpu(), log2phy.cpu(), logcnt.cpu()


def install(
    strategy: str | Strategy | None = None,
    max_moves: int | None = None,
    *,
    options: Options | None = None,
) -> None:
    """Replace vLLM's default policy in this process.

    Whether the installed vLLM expects one map or three is read from the annotations of its policy.

    Args:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`; None: that of the options.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU;
            None: that of the options.
        options: How to plan; None: those of the environment.

    Raises:
        ImportError: vLLM is not installed, or is a release without policies.
        TypeError: `max_moves` is not a whole number.
        ValueError: The strategy is not known, or an option is negative.
    """
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # pyright: ignore[reportMissingImports]

    chosen = options_of_environment() if options is None else options
    given = {"strategy": strategy, "max_moves": max_moves}
    chosen = dataclasses.replace(chosen, **{k: v for k, v in given.items() if v is not None})
    current = EPLB_POLICIES["default"]
    returned = current.rebalance_experts.__annotations__.get("return", "")
    names = vars(chosen) | {
        "memory": Memory(),
        "all_maps": getattr(current, "all_maps", "tuple" in str(returned).lower()),
    }
    EPLB_POLICIES["default"] = type("EplbPolicy", (EplbPolicy,), names)


def register() -> None:
    """Call `install` if the environment variable is set: the entry point for vLLM.

    Raises:
        ValueError: The variable is not the name of a strategy.
    """
    install_if_asked(VARIABLE, install)
