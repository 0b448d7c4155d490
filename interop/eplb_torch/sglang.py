"""SGLang: plans for its expert-parallel load balancer.

Call `install()` in every process that plans, before SGLang makes its first plan.
"""

from typing import Any

import torch

import eplb_torch.eplb
from eplb_jax import Strategy, resolve_strategy

_WINDOWS = 16
"""Windows that the steps of a call are added up to: a step is too short to say much."""


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
        tokens_per_expert: [T, L, E], loads of T steps, oldest first, or [L, E]. Consecutive steps
            are added up to at most 16 windows; strategies that do not use windows, such as
            "greedy", plan for the sum of all, as SGLang does.
        num_physical_experts: R, physical slots of a layer.
        num_local_physical_experts: Slots of one GPU; divides R.
        num_groups: Groups of consecutive experts; None for a model without.
        num_nodes: N; divides the number of GPUs.
        algorithm: A member of SGLang's `EplbAlgorithm`, or its name, which says whether the plan
            is hierarchical. `elasticity_aware`, which excludes failed GPUs, is not supported.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.

    Returns:
        The expert in every slot, [L, R]; the slots of every expert, [L, E, X] padded with -1; the
        number of replicas of every expert, [L, E]. Each int64, on the device of the load.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_torch.rebalance_experts`, or the algorithm is not supported.
    """
    name = getattr(algorithm, "name", algorithm)
    if not isinstance(name, str) or not name.startswith("deepseek"):
        known = "deepseek, deepseek_hierarchical, deepseek_vec, deepseek_vec_hierarchical"
        raise ValueError(f"algorithm={algorithm!r} is not supported; choose one of: {known}")
    hierarchical = name.endswith("_hierarchical")
    if hierarchical and num_groups is None:
        raise ValueError(f"algorithm={name} needs num_groups, got None; nearest: deepseek")
    slots, replicas = num_local_physical_experts, num_physical_experts
    if slots < 1 or replicas % slots:
        divisors = (d for d in range(1, replicas + 1) if replicas % d == 0)
        nearest = min(divisors, key=lambda d: abs(d - slots), default=1)
        raise ValueError(
            f"num_local_physical_experts={slots} does not divide num_physical_experts={replicas}; "
            f"nearest: {nearest}"
        )
    load = tokens_per_expert
    steps = isinstance(load, torch.Tensor) and load.ndim == 3 and not load.is_complex()
    if steps:
        windows = min(len(load), _WINDOWS) if resolve_strategy(strategy).distinct else 1
        dtype = torch.float64 if load.is_floating_point() else torch.int64
        if 0 < windows < len(load):
            sums = [x.sum(dim=0, dtype=dtype) for x in load.tensor_split(windows)]
            load = torch.stack(sums) if windows > 1 else sums[0]
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
    """Replace `sglang.srt.eplb.eplb_algorithms.rebalance_experts` in this process.

    The algorithms `elasticity_aware`, which exclude failed GPUs, still call SGLang's function.

    Args:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.

    Raises:
        ImportError: SGLang is not installed.
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
