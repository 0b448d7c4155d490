"""SGLang: plans for its expert-parallel load balancer.

Call `install()` in every process that plans, before SGLang makes its first plan.
"""

from typing import Any

import torch

import eplb_torch.eplb
from eplb_jax import Strategy
from eplb_jax.checks import as_count, check_divides
from eplb_jax.planning.strategies import resolve_strategy


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
    *,
    strategy: str | Strategy = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan from measured loads, with SGLang's arguments.

    Args:
        tokens_per_expert: [T, L, E], loads of T steps, oldest first, which are added up to at most
            16 windows, and for "greedy" to one, as SGLang does; or [L, E].
        num_physical_experts: R, physical slots of a layer.
        num_local_physical_experts: Slots of one GPU; divides R.
        num_groups: Groups of consecutive experts; None for a model without.
        num_nodes: N; divides the number of GPUs.
        algorithm: A member of SGLang's `EplbAlgorithm`, or its name. It says whether the plan
            is hierarchical, and nothing else; `elasticity_aware`, which leaves out GPUs that
            are down, is not offered.
        strategy: How to search: a name from `eplb_jax.STRATEGIES` or a `Strategy`.

    Returns:
        The expert in every slot, [L, R]; the slots of every expert, padded with -1; the replicas
        of every expert, [L, E]. Each int64, on the device of the load.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_torch.rebalance_experts`, or the algorithm is not offered.
    """
    name = getattr(algorithm, "name", algorithm)
    if not isinstance(name, str) or not name.startswith("deepseek"):
        offered = "deepseek, deepseek_hierarchical, deepseek_vec, deepseek_vec_hierarchical"
        raise ValueError(f"algorithm={algorithm!r} is not offered; choose one of: {offered}")
    hierarchical = name.endswith("_hierarchical")
    if hierarchical and num_groups is None:
        raise ValueError(f"algorithm={name} needs num_groups, got None; nearest: deepseek")
    slots = as_count("num_local_physical_experts", num_local_physical_experts)
    replicas = as_count("num_physical_experts", num_physical_experts)
    check_divides("num_local_physical_experts", slots, "num_physical_experts", replicas)
    load = tokens_per_expert
    in_one = isinstance(load, torch.Tensor) and load.ndim == 3 and not load.is_complex()
    if in_one and not resolve_strategy(strategy).distinct:
        load = load.sum(dim=0, dtype=torch.float64 if load.is_floating_point() else torch.int64)
    return eplb_torch.eplb.rebalance_experts(
        load,
        replicas,
        num_groups or 1,
        num_nodes,
        replicas // slots,
        policy="hierarchical" if hierarchical else "global",
        strategy=strategy,
    )


def install(strategy: str | Strategy = "auto") -> None:
    """Take the place of `sglang.srt.eplb.eplb_algorithms.rebalance_experts` in this process.

    Plans that must leave out GPUs (`elasticity_aware`) stay with SGLang's own function.

    Raises:
        ImportError: SGLang is missing.
        ValueError: The strategy is not known.
    """
    from sglang.srt.eplb import eplb_algorithms  # pyright: ignore[reportMissingImports]

    chosen = resolve_strategy(strategy)
    current = eplb_algorithms.rebalance_experts
    original = getattr(current, "replaced", current)

    def rebalance(
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = num_physical_experts, num_local_physical_experts, num_groups, num_nodes
        if str(getattr(algorithm, "name", algorithm)).startswith("elasticity_aware"):
            return original(tokens_per_expert, *counts, algorithm)
        return rebalance_experts(tokens_per_expert, *counts, algorithm, strategy=chosen)

    rebalance.replaced = original  # pyright: ignore[reportFunctionMemberAccess]
    eplb_algorithms.rebalance_experts = rebalance
