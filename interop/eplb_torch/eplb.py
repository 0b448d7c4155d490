"""DeepSeek's functions on torch tensors: their names, arguments, shapes and types.

The first call with a new shape, counts, strategy and device compiles, which takes seconds;
`preload` does that ahead. Later calls with new values or another dtype compile nothing.

Plans are computed on the CPU unless `device` says otherwise, as DeepSeek's are, and GPUs are left
to the model. Where JAX itself has GPUs, its first call starts them whatever `device` says, but
without reserving their memory, unless the environment (XLA_PYTHON_CLIENT_PREALLOCATE,
XLA_CLIENT_MEM_FRACTION) asks for that; JAX_PLATFORMS=cpu keeps JAX off them altogether.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

import eplb_jax
from eplb_jax import Strategy
from eplb_jax.planning.plan import Policy, place_replicas
from eplb_torch.backend import compute_device, untraced
from eplb_torch.handover import load_for, map_for

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
    """Pack n weighted items of every layer into packs of n / num_packs items, loads even.

    Args:
        weight: [L, n] weights in any unit and of any real dtype.
        num_packs: How many packs; divides n.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`; "greedy" is DeepSeek's.
        seed: Where the strategy draws at random: the same seed gives the same packing.
        device: Where to compute; None: the CPU.

    Returns:
        The pack of every item, and its place there: each int64 [L, n] on the device of `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.balanced_packing`, or JAX has no such device.

    Example:
        >>> balanced_packing(torch.tensor([[8, 1, 6, 3, 5, 4]]), 3)
        (tensor([[1, 1, 0, 0, 2, 2]]), tensor([[0, 1, 0, 1, 0, 1]]))
    """
    target = compute_device(device)
    with jax.default_device(target):
        load = load_for(target, weight)
        packing = eplb_jax.balanced_packing(load, num_packs, strategy=strategy, key=_key(seed))
    pack_index, rank_in_pack = packing
    return map_for(weight, pack_index), map_for(weight, rank_in_pack)


@untraced
def replicate_experts(
    weight: torch.Tensor, num_phy: int, *, device: Device = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the spare replicas of every layer, one by one, to the expert of most load per replica.

    Args:
        weight: [L, E] loads in any unit and of any real dtype.
        num_phy: R, how many replicas a layer has in all; at least E.
        device: Where to compute; None: the CPU.

    Returns:
        The expert of every replica and the replica's rank among those of its expert, each
        int64 [L, R], and the replicas of every expert, int64 [L, E], on the device of `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.replicate_experts`, or JAX has no such device.

    Example:
        >>> replicate_experts(torch.tensor([[6, 3, 2]]), 5)[0]
        tensor([[0, 1, 2, 0, 0]])
    """
    target = compute_device(device)
    with jax.default_device(target):
        replication = eplb_jax.replicate_experts(load_for(target, weight), num_phy)
    phy2log, rank, logcnt = replication
    return map_for(weight, phy2log), map_for(weight, rank), map_for(weight, logcnt)


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
        int64 [L, R], and the replicas of every expert, int64 [L, E], on the device of `weight`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.rebalance_experts`, or JAX has no such device.

    Example:
        >>> load = torch.tensor([[90, 30, 20, 10]])
        >>> rebalance_experts_hierarchical(load, 6, 1, 1, 3)[:2]
        (tensor([[0, 3, 0, 3, 1, 2]]), tensor([[1, 1, 0, 0, 0, 0]]))
    """
    counts = num_physical_experts, num_groups, num_nodes, num_gpus
    phy2log, rank, logcnt = _plan(weight, counts, "hierarchical", strategy, seed, device)
    return map_for(weight, phy2log), map_for(weight, rank), map_for(weight, logcnt)


@untraced
def rebalance_experts(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    strategy: str | Strategy = "auto",
    policy: Policy = "auto",
    seed: int = 0,
    device: Device = None,
    previous: torch.Tensor | None = None,
    max_moves: int | None = None,
    price: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan where the replicas of every expert lie, from measured loads.

    With ``strategy="greedy"`` the plan is DeepSeek's, bit for bit where no loads tie; among ties,
    as all replicas of one expert are, the lowest index goes first. All other strategies balance
    better, and hold no expert twice on a GPU where that can be avoided.

    Args:
        weight: [L, E] loads in any unit (tokens) and of any real dtype, or [T, L, E] of T past
            windows, oldest first: the plan is then made for the next.
        num_replicas: R, physical slots of a layer; a multiple of num_gpus, at least E.
        num_groups: Groups of consecutive experts; divides E.
        num_nodes: N; divides num_gpus and, for the hierarchical policy, num_groups.
        num_gpus: G, over all nodes.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        policy: "global", "hierarchical", or "auto": hierarchical exactly when num_nodes
            divides num_groups.
        seed: Where the strategy draws at random: the same seed gives the same plan.
        device: Where to compute; None: the CPU.
        previous: [L, R], the expert in every slot until now: as many as possible stay.
        max_moves: At most so many slots of a layer are fetched from another GPU.
        price: What a fetched slot costs in imbalance of its layer.

    Returns:
        The expert in every slot, [L, R]; the slots of every expert, [L, E, X] with X the most
        replicas that an expert has, padded with -1; the replicas of every expert, [L, E]. Each
        int64, on the device of `weight`, and the caller's to change.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `eplb_jax.rebalance_experts`, or JAX has no such device.

    Example:
        >>> rebalance_experts(torch.tensor([[90, 30, 20, 10]]), 6, 1, 1, 3)[0]
        tensor([[0, 3, 0, 3, 1, 2]])
    """
    counts = num_replicas, num_groups, num_nodes, num_gpus
    slots = None if previous is None else previous.detach().cpu().numpy()
    change = {"previous": slots, "max_moves": max_moves, "price": price}
    phy2log, rank, logcnt = _plan(weight, counts, policy, strategy, seed, device, **change)
    log2phy = _slots_of(np.asarray(phy2log), np.asarray(rank), np.asarray(logcnt))
    log2phy = torch.from_numpy(log2phy).to(weight.device)
    return map_for(weight, phy2log), log2phy, map_for(weight, logcnt)


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
) -> None:
    """Compile `rebalance_experts` for loads of this shape, so that no later call has to wait.

    What is compiled serves any dtype, values, seed, plan in place and thread, and the calls of
    `eplb_torch.vllm` and `eplb_torch.sglang` with these arguments, until the process ends. Another
    shape, count, strategy, policy or device is another compilation, and so is another JAX
    configuration (x64).

    Args:
        shape: (L, E), or (T, L, E), of the loads to come.
        num_replicas: R, as all that follow, of the calls to come.
        num_groups: Groups of experts.
        num_nodes: N.
        num_gpus: G.
        strategy: A name or a `Strategy`.
        policy: "auto", "global" or "hierarchical".
        device: Where to compute; None: the CPU.

    Example:
        >>> preload((58, 256), 288, 8, 4, 32)  # doctest: +SKIP
    """
    counts = num_replicas, num_groups, num_nodes, num_gpus
    idle = torch.zeros(tuple(shape), device="cpu")
    options = {"strategy": strategy, "policy": policy, "device": device}
    plan, *_ = rebalance_experts(idle, *counts, **options)
    rebalance_experts(idle, *counts, seed=1, previous=plan, **options)  # another seed is a key


def _slots_of(phy2log: np.ndarray, rank: np.ndarray, logcnt: np.ndarray) -> np.ndarray:
    """`log2phy` with room for the most replicas that an expert has, padded with -1."""
    (num_layers, num_slots), num_experts = phy2log.shape, logcnt.shape[1]
    most = int(logcnt.max(initial=1))
    row = np.arange(num_layers)[:, None] * num_experts + phy2log
    log2phy = np.full((num_layers, num_experts, most), -1)
    log2phy.reshape(-1)[row * most + rank] = np.arange(num_slots)
    return log2phy


def _plan(
    weight: torch.Tensor,
    counts: tuple[int, int, int, int],
    policy: Policy,
    strategy: str | Strategy,
    seed: int,
    device: Device,
    **change: Any,
) -> eplb_jax.Replication:
    target = compute_device(device)
    options = {"policy": policy, "strategy": strategy, "key": _key(seed)}
    with jax.default_device(target):
        return place_replicas(load_for(target, weight), *counts, **options, **change)


def _key(seed: int) -> jax.Array | None:
    """None stands for seed 0 and costs nothing."""
    return None if seed == 0 else jax.random.key(seed)
