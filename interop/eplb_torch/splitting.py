"""Shares of replicas for balanced GPUs on tensors, without JAX and without a host sync."""

import torch

from eplb_torch.split_plan import SplitPlan, check_shape, pick_entries

_OVERSTEP = 1.3  # step size over the safe one, as in `eplb_jax`
_LARGEST = torch.finfo(torch.float32).max


@torch.no_grad()
def split_load(
    load: torch.Tensor, plan: SplitPlan, *, steps: int = 32, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The share of every slot in the current load of its expert, for balanced GPUs.

    `eplb_jax.runtime.split_load` says which problem this solves and how. On a GPU, sums are
    gathered in a fixed order, so that all ranks get the same shares. A step takes O(R) on a CPU,
    and about twenty kernels unless it is compiled.

    Args:
        load: Tokens of every expert, summed over all GPUs, of any real dtype: [L, E], or [E] of one
            layer. NaN and negative loads count as 0.
        plan: Of `prepare_split`, for the same layers and experts.
        steps: Gradient steps. On the bundled traces, 8 come within 5e-3 of the least maximum, 16
            within 5e-4 and 32 within 2e-5 of the mean GPU load.
        start: Shares to start from, [L, R] or [R], such as those of the last step with this plan,
            where loads change little; those of an expert are divided by their sum. None: equal
            shares.

    Returns:
        Shares, float32 [L, R] or [R], with sum 1 over the slots of an expert; equal shares where it
        has no load, 0 in empty slots. The maximum GPU load is at most that of equal shares, up to
        rounding.

    Raises:
        ValueError: A shape does not fit the plan, or `steps` is negative.

    Example:
        >>> from eplb_torch import prepare_split
        >>> plan = prepare_split([0, 2, 0, 1, 0, 3], num_experts=4, num_gpus=3)
        >>> (10 * split_load(torch.tensor([3, 3, 1, 1]), plan)).round()
        tensor([ 5., 10.,  0., 10.,  5., 10.])
    """
    check_shape("load", load, plan, plan.num_experts)
    if start is not None:
        check_shape("start", start, plan, plan.expert.shape[-1])
    if steps < 0:
        raise ValueError(f"steps={steps}; use at least 0")
    if plan.row_expert.shape[-1] == 0:
        return plan.equal.clone()
    num_gpus = plan.gpu_entries.shape[-2]
    load = _sanitise(load)
    load = load * (num_gpus / load.sum(-1, keepdim=True).clamp_min(1e-30))
    slot_load = load.gather(-1, plan.expert)
    alone = _gpu_loads(slot_load * plan.equal * plan.alone, plan)
    row_load = load.gather(-1, plan.row_expert)
    total = slot_load.gather(-1, plan.slot) * plan.used
    active = (total > 0).float()
    count = _over_gpus(active, torch.zeros_like(alone), plan)
    curvature = count / _OVERSTEP
    pull = active * _OVERSTEP / count.clamp_min(1)  # 0 keeps an entry at 0
    zero = torch.zeros_like(row_load)
    share = pull / _over_rows(pull, zero, plan).clamp_min(1e-30)

    equal = plan.equal.gather(-1, plan.slot) * plan.used

    def as_shares(parts: torch.Tensor) -> torch.Tensor:
        whole = _over_rows(parts, zero, plan)
        return torch.where(whole > 0, parts / torch.where(whole > 0, whole, 1), equal)

    now = total * equal
    if start is not None:
        now = total * as_shares(_sanitise(start).gather(-1, plan.slot) * plan.used)
    ahead, age = now, torch.zeros_like(now[..., :1])  # age: steps since momentum was restarted
    for _ in range(steps):
        moved = torch.addcmul(ahead, _over_gpus(ahead, alone, plan), pull, value=-1)
        # A shift restores the load of an expert; the next step corrects for the clipping.
        excess = _over_rows(moved, -row_load, plan)
        new = torch.addcmul(moved, excess, share, value=-1).clamp_min(0)
        change = new - now
        uphill = ((ahead - new) * change * curvature).sum(-1, keepdim=True) > 0
        age = age.masked_fill(uphill, 0)
        ahead, now, age = torch.addcmul(new, age / (age + 2), change), new, age + 1
    shares = torch.where(plan.alone, plan.equal, as_shares(now).gather(-1, plan.entry))

    best = _gpu_loads(slot_load * plan.equal, plan).amax(-1, keepdim=True)
    worse = _gpu_loads(slot_load * shares, plan).amax(-1, keepdim=True) > best * (1 + 1e-6)
    return torch.where(worse, plan.equal, shares)


def _sanitise(values: torch.Tensor) -> torch.Tensor:
    """Finite floats of at least 0, scaled exactly so that no sum overflows."""
    return torch.nan_to_num(values.float(), 0, _LARGEST, 0).clamp_min(0) * 2.0**-64


def _gpu_loads(slot_load: torch.Tensor, plan: SplitPlan) -> torch.Tensor:
    return slot_load.unflatten(-1, plan.gpu_entries.shape[-2:]).sum(-1)


def _over_gpus(values: torch.Tensor, base: torch.Tensor, plan: SplitPlan) -> torch.Tensor:
    """For every entry, `base` of its GPU plus the sum of the entries there."""
    return _add_by_key(values, base, plan.gpu, plan.gpu_entries)


def _over_rows(values: torch.Tensor, base: torch.Tensor, plan: SplitPlan) -> torch.Tensor:
    """For every entry, `base` of its expert plus the sum of the entries of that expert."""
    return _add_by_key(values, base, plan.row, plan.row_entries)


def _add_by_key(
    values: torch.Tensor, base: torch.Tensor, key: torch.Tensor, entries: torch.Tensor
) -> torch.Tensor:
    if values.device.type == "cpu":
        return base.scatter_add(-1, key, values).gather(-1, key)
    # A scatter adds in any order on a GPU.
    return (base + pick_entries(values, entries).sum(-1)).gather(-1, key)
