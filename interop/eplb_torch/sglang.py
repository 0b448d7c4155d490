"""SGLang: plans for its expert-parallel load balancer.

With EPLB_TORCH_SGLANG=1, or set to the name of a strategy, SGLang's processes load this module
through the entry point `sglang.srt.plugins`. In Python, call `install()` in every process that
plans, before SGLang makes its first plan. Other options are environment variables: see
`eplb_torch.memory`.
"""

import dataclasses
from typing import Any

import torch

import eplb_torch.eplb
from eplb_jax import Strategy, resolve_strategy
from eplb_torch.memory import Memory, Options, install_if_asked, options_of_environment

VARIABLE = "EPLB_TORCH_SGLANG"
"""The environment variable that `register` reads: 1, or the name of a strategy."""

_WINDOWS = 8
"""Windows that the steps of a call are added up to: a step is too short to say much."""


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
    active_ranks: torch.Tensor | None = None,
    *,
    strategy: str | Strategy | None = None,
    options: Options | None = None,
    memory: Memory | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan from measured loads, with SGLang's arguments.

    Args:
        tokens_per_expert: [T, L, E], loads of T steps, oldest first, or [L, E]. SGLang's recorder
            hands on its ring as it lies, so that the first step need not be the oldest, which costs
            some of what recent windows are worth. Consecutive steps are added up to at most 8
            windows; strategies that do not use windows, such as "greedy", plan for the sum of all,
            as SGLang does.
        num_physical_experts: R, physical slots of a layer.
        num_local_physical_experts: Slots of one GPU; divides R.
        num_groups: Groups of consecutive experts; None for a model without.
        num_nodes: N; divides the number of GPUs.
        algorithm: A member of SGLang's `EplbAlgorithm`, or its name, which says whether the plan
            is hierarchical.
        active_ranks: Which GPUs are alive, 0 or 1, for `elasticity_aware`; numbers past the last
            GPU are ignored. Nodes are kept where they can be.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`; None: that of the options.
        options: How to plan; None: the defaults.
        memory: What earlier calls have seen, and the plan that the last one returned, which is
            taken to be in place; None: nothing.

    Returns:
        The expert in every slot, [L, R]; the slots of every expert, [L, E, X] padded with -1; the
        number of replicas of every expert, [L, E]. Each int64, on the device of the load. Slots of
        GPUs that are not alive hold expert 0, as SGLang indexes with them, and are not listed.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_torch.rebalance_experts`, or the algorithm is not supported.
    """
    name = str(getattr(algorithm, "name", algorithm))
    elastic = name.startswith("elasticity_aware")
    if not elastic and not name.startswith("deepseek"):
        known = "deepseek, deepseek_vec, elasticity_aware, each also with _hierarchical"
        raise ValueError(f"algorithm={algorithm!r} is not supported; choose one of: {known}")
    hierarchical = name.endswith("_hierarchical")
    if hierarchical and num_groups is None:
        raise ValueError(f"algorithm={name} needs num_groups, got None; nearest: deepseek")
    options = Options() if options is None else options
    strategy = options.strategy if strategy is None else strategy
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
    counts = replicas, num_groups or 1, num_nodes, replicas // slots
    kept: dict[str, Any] = {}
    seen, key = load, (*counts, hierarchical)
    if memory is not None:
        if options.remember and resolve_strategy(strategy).distinct:
            seen = memory.observe(load, counts)
        old = memory.last_plan((tuple(load.shape[-2:]), *key))
        kept = {} if old is None else {"previous": old, **options.limits}
    if elastic and active_ranks is not None:
        kept["active"] = active_ranks[: replicas // slots].cpu() != 0
    policy = "hierarchical" if hierarchical else "global"
    maps = eplb_torch.eplb.rebalance_experts(
        seen, *counts, policy=policy, strategy=strategy, **kept
    )
    if memory is not None:
        memory.keep_plan((tuple(load.shape[-2:]), *key), maps[0].cpu())
    phy2log, log2phy, logcnt = (x.to(load.device) for x in maps)
    return phy2log.clamp(min=0), log2phy, logcnt


def install(strategy: str | Strategy | None = None, *, options: Options | None = None) -> None:
    """Replace `sglang.srt.eplb.eplb_algorithms.rebalance_experts` in this process.

    Args:
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`; None: that of the options.
        options: How to plan; None: those of the environment.

    Raises:
        ImportError: SGLang is not installed.
        ValueError: The strategy or an option of the environment is not known.
    """
    from sglang.srt.eplb import eplb_algorithms  # pyright: ignore[reportMissingImports]

    chosen = options_of_environment() if options is None else options
    if strategy is not None:
        chosen = dataclasses.replace(chosen, strategy=resolve_strategy(strategy))
    memory = Memory()

    def rebalance(
        tokens_per_expert: torch.Tensor,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts = num_physical_experts, num_local_physical_experts, num_groups, num_nodes
        active = None
        if str(getattr(algorithm, "name", algorithm)).startswith("elasticity_aware"):
            active = _active_ranks()
        arguments = tokens_per_expert, *counts, algorithm, active
        return rebalance_experts(*arguments, options=chosen, memory=memory)

    eplb_algorithms.rebalance_experts = rebalance


def register() -> None:
    """Call `install` if the environment variable is set: the entry point for SGLang.

    Raises:
        ValueError: The variable is not the name of a strategy.
    """
    install_if_asked(VARIABLE, install)


def _active_ranks() -> torch.Tensor | None:
    """SGLang's mask of live GPUs; None where it has none."""
    from sglang.srt.elastic_ep import elastic_ep  # pyright: ignore[reportMissingImports]

    state = elastic_ep.ElasticEPStateManager.instance()
    return None if state is None else state.active_ranks
