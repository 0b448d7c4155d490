"""DeepSeek's functions on torch tensors: their names, arguments, shapes and types.

The first call with a new shape, topology, strategy or device compiles, which takes seconds;
`preload` does so ahead of time. Later calls with new values or another dtype compile nothing.

Plans are computed on the CPU unless `device` names another device. If JAX has GPUs, its first call
starts them in any case, but reserves none of their memory unless the environment
(XLA_PYTHON_CLIENT_PREALLOCATE, XLA_CLIENT_MEM_FRACTION) asks for it. JAX_PLATFORMS=cpu keeps JAX
off GPUs.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import torch

import eplb_jax
from eplb_jax import TOLERANCE, Cost, History, Policy, Strategy
from eplb_torch.backend import compute_device, untraced
from eplb_torch.conversion import as_map, as_previous, as_weight

Device = str | torch.device | jax.Device | None
"""Where to compute: "cpu" (or None), "cuda", "cuda:1", "tpu", a torch device or a JAX device."""


@untraced
def balanced_packing(
    weight: torch.Tensor,
    num_packs: int,
    *,
    strategy: str | Strategy = "auto",
    seed: int = 0,
    device: Device = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack n weighted items of every layer into packs of n / num_packs items with balanced loads.

    Args:
        weight: [L, n] weights in any unit and of any real dtype.
        num_packs: Number of packs; divides n.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`; "greedy" is DeepSeek's.
        seed: For strategies that draw at random: the same seed gives the same packing.
        device: Where to compute; None: the CPU.

    Returns:
        The pack of every item and its position in that pack, each int64 [L, n] on the device of
        `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.balanced_packing`, or JAX has no such device.

    Example:
        >>> balanced_packing(torch.tensor([[8, 1, 6, 3, 5, 4]]), 3)
        (tensor([[1, 1, 0, 0, 2, 2]]), tensor([[0, 1, 0, 1, 0, 1]]))
    """
    target = compute_device(device)
    with jax.default_device(target):
        load, key = as_weight(weight, target), jax.random.key(seed)
        packing = eplb_jax.balanced_packing(load, num_packs, strategy=strategy, key=key)
    pack_index, rank_in_pack = packing
    return as_map(pack_index, weight), as_map(rank_in_pack, weight)


@untraced
def replicate_experts(
    weight: torch.Tensor, num_phy: int, *, device: Device = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each spare replica of a layer to the expert with the most load per replica.

    Args:
        weight: [L, E] loads in any unit and of any real dtype.
        num_phy: R, the number of replicas of a layer; at least E.
        device: Where to compute; None: the CPU.

    Returns:
        The expert of every replica and the replica's rank among those of its expert, each
        int64 [L, R], and the number of replicas of every expert, int64 [L, E], on the device of
        `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.replicate_experts`, or JAX has no such device.

    Example:
        >>> replicate_experts(torch.tensor([[6, 3, 2]]), 5)[0]
        tensor([[0, 1, 2, 0, 0]])
    """
    target = compute_device(device)
    with jax.default_device(target):
        replication = eplb_jax.replicate_experts(as_weight(weight, target), num_phy)
    phy2log, rank, logcnt = replication
    return as_map(phy2log, weight), as_map(rank, weight), as_map(logcnt, weight)


@untraced
def rebalance_experts_hierarchical(
    weight: torch.Tensor,
    num_physical_experts: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    strategy: str | Strategy = "auto",
    seed: int = 0,
    device: Device = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rebalance_experts` under the hierarchical policy, with ranks in place of `log2phy`.

    Returns:
        The expert in every slot and the rank of that replica among those of its expert, each
        int64 [L, R], and the number of replicas of every expert, int64 [L, E], on the device of
        `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.rebalance_experts`, or JAX has no such device.

    Example:
        >>> load = torch.tensor([[90, 30, 20, 10]])
        >>> rebalance_experts_hierarchical(load, 6, 1, 1, 3)[:2]
        (tensor([[0, 3, 0, 3, 1, 2]]), tensor([[1, 1, 0, 0, 0, 0]]))
    """
    options: dict[str, Any] = {"strategy": strategy, "seed": seed, "device": device}
    counts = num_physical_experts, num_groups, num_nodes, num_gpus
    phy2log, log2phy, logcnt = rebalance_experts(weight, *counts, policy="hierarchical", **options)
    listed = log2phy.gather(1, phy2log[..., None].expand(-1, -1, log2phy.shape[2]))
    slot = torch.arange(phy2log.shape[1], device=phy2log.device)
    return phy2log, (listed == slot[:, None]).int().argmax(dim=2), logcnt


@untraced
def rebalance_experts(
    weight: torch.Tensor | History,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    strategy: str | Strategy = "auto",
    policy: Policy = "auto",
    seed: int = 0,
    device: Device = None,
    previous: Any = None,
    previous_gpus: Sequence[int] | None = None,
    active: Any = None,
    speed: Any = None,
    tolerance: float | None = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the expert of every physical slot, from measured loads.

    With ``strategy="greedy"`` the plan is DeepSeek's, bit for bit where no loads tie. Ties, which
    the replicas of one expert always are, go to the lowest index. The other strategies balance
    better, and avoid two replicas of an expert on one GPU where possible.

    Args:
        weight: [L, E] loads in any unit (tokens) and of any real dtype, or [T, L, E] of T past
            windows, oldest first: the plan is then made for the next window. Or an
            `eplb_jax.History`.
        num_replicas: R, physical slots of a layer; a multiple of num_gpus, at least E.
        num_groups: Groups of consecutive experts; divides E.
        num_nodes: N; divides num_gpus and, for the hierarchical policy, num_groups.
        num_gpus: G, over all nodes.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        policy: "global", "hierarchical", or "auto": hierarchical exactly if num_nodes divides
            num_groups.
        seed: For strategies that draw at random: the same seed gives the same plan.
        device: Where to compute; None: the CPU.
        previous: [L, R], the expert in every slot of the plan in place, which the new plan starts
            from, -1 in empty slots: a tensor on any device, a NumPy array or a list, of integers.
        previous_gpus: For every GPU the number that it had in `previous`, -1 for a new one.
        active: [G], whether every GPU is alive; the slots of the others hold -1.
        speed: [G], tokens per second of every GPU, in any unit.
        tolerance: How much worse than a new plan the next one may be, as of `eplb_jax.plan`; None:
            a new plan, renumbered.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU.
        move_penalty: Imbalance that a move must gain.
        split: "flexible": a plan for `eplb_torch.split_load`. None: for equal shares.
        cost: What tokens and active experts cost (`eplb_jax.Cost`): a plan by time, which may leave
            slots empty, -1. None: by tokens.

    Returns:
        The expert in every slot, [L, R]; the slots of every expert, [L, E, X] padded with -1,
        where X is the maximum number of replicas of an expert; the number of replicas of every
        expert, [L, E]. Each is a new int64 tensor on the device of `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.rebalance_experts`, or JAX has no such device.

    Example:
        >>> rebalance_experts(torch.tensor([[90, 30, 20, 10]]), 6, 1, 1, 3)[0]
        tensor([[0, 3, 0, 3, 1, 2]])
    """
    target = compute_device(device)
    seen = isinstance(weight, History)
    like = torch.empty(0, device="cpu") if seen else weight
    with jax.default_device(target):
        phy2log, log2phy, logcnt = eplb_jax.rebalance_experts(
            weight if seen else as_weight(weight, target),
            num_replicas,
            num_groups,
            num_nodes,
            num_gpus,
            policy=policy,
            strategy=strategy,
            key=jax.random.key(seed),  # an argument, so that all seeds share a program
            previous=as_previous(previous),
            previous_gpus=previous_gpus,
            active=as_previous(active),
            speed=as_previous(speed),
            tolerance=tolerance,
            max_moves=max_moves,
            move_penalty=move_penalty,
            split=split,
            cost=cost,
        )
    width = int(np.asarray(logcnt).max(initial=1))
    return as_map(phy2log, like), as_map(log2phy, like, width), as_map(logcnt, like)


def preload(
    shape: Sequence[int],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    strategy: str | Strategy = "auto",
    policy: Policy = "auto",
    device: Device = None,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    elastic: bool = False,
    remember: bool = False,
) -> None:
    """Compile `rebalance_experts` for loads of this shape, so no later call waits for a compiler.

    One call covers any dtype, values, seed, plan in place, limit on moves and thread, and the
    calls of `eplb_torch.vllm` and `eplb_torch.sglang` with these arguments, until the process
    ends. Another shape, topology, strategy, policy, device or JAX configuration (x64) needs
    another call.

    Args:
        shape: (L, E), or (T, L, E), of the loads to come.
        num_replicas: R, as of `rebalance_experts`, and so are all that follow.
        num_groups: Groups of consecutive experts.
        num_nodes: N.
        num_gpus: G.
        strategy: A name or a `Strategy`.
        policy: "auto", "global" or "hierarchical".
        device: Where to compute; None: the CPU.
        max_moves: Checked here as in a call. Other limits are covered too.
        move_penalty: Likewise.
        elastic: Whether to compile for `active` and incomplete plans in place as well.
        remember: Whether to compile for histories too, as the plug-ins for engines plan from.

    Raises:
        TypeError: As `rebalance_experts`.
        ValueError: As `rebalance_experts`.

    Example:
        >>> preload((58, 256), 288, 8, 4, 32)  # doctest: +SKIP
    """
    load: torch.Tensor | History = torch.zeros(tuple(shape), device="cpu")
    if remember:
        options: dict[str, Any] = {"strategy": strategy, "policy": policy, "device": device}
        options |= {"max_moves": max_moves, "move_penalty": move_penalty, "elastic": elastic}
        preload(shape, num_replicas, num_groups, num_nodes, num_gpus, **options)
        load = eplb_jax.init_history(*tuple(shape)[-2:])
        load = eplb_jax.update_history(load, np.ones(tuple(shape)[-2:], np.float32))
    call = functools.partial(
        rebalance_experts,
        load,
        *(num_replicas, num_groups, num_nodes, num_gpus),
        strategy=strategy,
        policy=policy,
        device=device,
    )
    old, *_ = call()
    call(previous=old, max_moves=max_moves, move_penalty=move_penalty)
    call(previous=old, tolerance=None)
    if elastic:
        call(previous=old, active=np.ones(num_gpus, bool))
