"""Tokens of every slot and slots of routed tokens, without JAX and without a host sync."""

import itertools
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from eplb_torch.split_plan import SplitPlan, check_integers, check_shape, pick_entries

_BLOCK = 16  # terms that XLA adds in turn in a cumulative sum


def expert_counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The number of tokens that a router sends to every expert, int32 [E].

    `torch.bincount` makes the host wait for a GPU; this does not.

    Args:
        ids: Routed experts, integers of any shape. Ids outside 0..E-1 are not counted.
        num_experts: E.

    Raises:
        TypeError: ids are not integers.

    Example:
        >>> expert_counts(torch.tensor([[0, 2], [2, -1]]), 4)
        tensor([1, 0, 2, 0], dtype=torch.int32)
    """
    check_integers("ids", ids)
    expert = _known(ids, num_experts)
    empty = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    ones = torch.ones(1, dtype=torch.int32, device=ids.device).expand(expert.shape)
    return empty.scatter_add(0, expert, ones)[:num_experts]


class Quotas(NamedTuple):
    """The tokens of every slot, and how many of its expert come before them, int32 [*L, R].

    Token i of an expert, numbered from 0 as tokens come, goes to the slot with
    first <= i < first + tokens.
    """

    tokens: torch.Tensor
    first: torch.Tensor


@torch.no_grad()
def quotas(load: torch.Tensor, plan: SplitPlan, shares: torch.Tensor) -> Quotas:
    """Shares of a load as whole tokens, each within one of its share, that add up to the load.

    Equal to `eplb_jax.runtime.quotas` on a CPU, which rounds cumulative shares, for equal shares.

    Args:
        load: Tokens of every expert, integers below 2^31: [L, E], or [E] of one layer.
        plan: Of `prepare_split`, for the same layers and experts.
        shares: Of every slot in the load of its expert, as of `split_load`. Those of an expert are
            divided by their sum; where that is 0, its first slot gets all.

    Raises:
        TypeError: The load does not hold integers.
        ValueError: A shape does not fit the plan.

    Example:
        >>> from eplb_torch import prepare_split
        >>> plan = prepare_split([0, 1, 0, 1], num_experts=2, num_gpus=2)
        >>> result = quotas(torch.tensor([5, 3]), plan, torch.tensor([0.5, 1.0, 0.5, 0.0]))
        >>> result.tokens.tolist(), result.first.tolist()
        ([2, 3, 3, 0], [0, 0, 2, 3])
    """
    check_integers("load", load)
    check_shape("load", load, plan, plan.num_experts)
    check_shape("shares", shares, plan, plan.expert.shape[-1])
    load = load.long()
    row_load = load.gather(-1, plan.row_expert)[..., None]
    parts = shares.float().gather(-1, plan.slot) * plan.used
    total = _cumulative_sum(pick_entries(parts, plan.row_entries))
    whole = total[..., -1:]
    part = total * (1 / torch.where(whole > 0, whole, 1))  # as XLA divides
    ends = torch.minimum((part * row_load.float()).round().long(), row_load)
    ends = torch.where(total >= whole, row_load, ends)
    first = pad(ends[..., :-1], (1, 0))

    def of_slots(values: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
        values = pad(values.flatten(-2), (0, 1)).gather(-1, plan.cell)
        return torch.where(plan.alone, alone, values).int()

    slot_load = load.gather(-1, plan.expert)
    return Quotas(of_slots(ends - first, slot_load), of_slots(first, torch.zeros_like(slot_load)))


@torch.no_grad()
def to_physical(
    ids: torch.Tensor,
    plan: SplitPlan,
    quotas: Quotas,
    *,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """The slot of every routed token: the tokens of an expert fill its slots' quotas in turn.

    Tokens are numbered in the order of ids. Where they are more than the load that quotas were made
    for, the last ones go to the last slot of their expert. Sorts ids.

    Args:
        ids: Logical experts, [tokens, k] or of any shape, integers. Ids outside 0..E-1 are padding,
            and -1 in the result.
        plan: Of one layer, [R]: `SplitPlan.layer`.
        quotas: Of this layer, for the load of these ids, or of all GPUs if `before` is given.
        before: [E], the tokens of every expert on the GPUs before this one; None: no others.

    Returns:
        Slots, of the shape and dtype of ids.

    Raises:
        TypeError: ids or before do not hold integers.
        ValueError: The plan has several layers, or a shape does not fit it.

    Example:
        >>> from eplb_torch import prepare_split
        >>> plan = prepare_split([0, 1, 2, 0], num_experts=3, num_gpus=2)
        >>> ids = torch.tensor([[0, 1], [0, 2], [0, -1]])
        >>> shares = torch.tensor([0.4, 1.0, 1.0, 0.6])
        >>> to_physical(ids, plan, quotas(expert_counts(ids, 3), plan, shares)).tolist()
        [[0, 1], [3, 2], [3, -1]]
    """
    check_integers("ids", ids)
    if plan.expert.ndim != 1:
        raise ValueError(f"plan has {plan.expert.shape[0]} layers; give one: plan.layer(i)")
    for x in quotas:
        check_shape("quotas", x, plan, plan.expert.shape[-1])
    expert = _known(ids, plan.num_experts)
    if plan.num_experts < 2**15:
        expert = expert.short()  # sorted in half the time
    expert, place = torch.sort(expert, stable=True)
    expert = expert.long()
    of_expert = torch.arange(plan.num_experts + 1, device=ids.device)
    start = torch.searchsorted(expert, of_expert)
    if before is not None:
        check_integers("before", before)
        check_shape("before", before, plan, plan.num_experts)
        start = start - pad(before.long(), (0, 1))
    number = torch.arange(expert.shape[0], device=ids.device) - start[expert]
    # One number for expert and token: the quotas of an expert never reach the next one.
    bounds = plan.order_key + quotas.first[plan.order]
    found = torch.searchsorted(bounds, (expert << 32) + number, right=True) - 1
    slot = plan.order[found].masked_fill(expert == plan.num_experts, -1)
    return torch.empty_like(slot).scatter(0, place, slot).reshape(ids.shape).to(ids.dtype)


def _known(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The expert of every id, int64 [n], E for padding."""
    flat = ids.reshape(-1).long()
    return flat.masked_fill((flat < 0) | (flat >= num_experts), num_experts)


def _cumulative_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums in the order in which XLA adds on a CPU; `torch.cumsum` adds in float64 there."""
    if x.shape[-1] <= _BLOCK:
        return torch.stack(list(itertools.accumulate(x.unbind(-1))), -1)
    size = x.shape[-1]
    blocks = _cumulative_sum(pad(x, (0, -size % _BLOCK)).unflatten(-1, (-1, _BLOCK)))
    earlier = pad(_cumulative_sum(blocks[..., -1])[..., :-1], (1, 0))
    return (blocks + earlier[..., None]).flatten(-2)[..., :size]
