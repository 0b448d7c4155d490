"""What a flexible split needs of a plan, as tensors that stay in place while plans change."""

from typing import Any, NamedTuple

import numpy as np
import torch


class SplitPlan(NamedTuple):
    """The plan of L layers, or of one, as `split_load`, `quotas` and `to_physical` read it.

    Entries are the slots of experts with several replicas, in the order of slots: W of them at
    most. One more entry, the last, is never used; tables and slots without an entry name it. Rows
    are the experts with several replicas, K at most.
    """

    expert: torch.Tensor  # int64 [*L, R]: the expert in every slot, 0 in empty ones
    equal: torch.Tensor  # float32 [*L, R]: equal shares, 0 in empty slots
    alone: torch.Tensor  # bool [*L, R]: the slot holds the only replica of its expert
    entry: torch.Tensor  # int64 [*L, R]: the entry of every slot
    slot: torch.Tensor  # int64 [*L, W + 1]: the slot of every entry
    row: torch.Tensor  # int64 [*L, W + 1]: the row of every entry
    gpu: torch.Tensor  # int64 [*L, W + 1]: the GPU of every entry
    used: torch.Tensor  # float32 [*L, W + 1]: 1 for entries that are slots, else 0
    row_expert: torch.Tensor  # int64 [*L, K]: the expert of every row
    row_entries: torch.Tensor  # int64 [*L, K, X]: the entries of every row, by rank
    gpu_entries: torch.Tensor  # int64 [*L, G, R / G]: the entries of every GPU
    cell: torch.Tensor  # int64 [*L, R]: the place of every slot in [K, X]; K * X without an entry
    order: torch.Tensor  # int64 [*L, R]: slots by expert and rank, empty ones last
    order_key: torch.Tensor  # int64 [*L, R]: 2^32 times the expert of these slots, E if empty
    num_experts: int

    def layer(self, index: int) -> "SplitPlan":
        """One layer, in the same memory: `update` of the whole changes it too."""
        return SplitPlan._make([*(x[index] for x in self[:-1]), self.num_experts])

    def update(self, phy2log: Any) -> None:
        """Write another plan into the same memory, so that captured CUDA graphs follow it.

        Waits for `phy2log`; the writes are queued on the current stream, so call it on the stream
        that replays the graphs, between two steps.

        Args:
            phy2log: The expert in every slot, of the same shape; -1 in empty slots.

        Raises:
            TypeError: As of `prepare_split`.
            ValueError: As of `prepare_split`, or the shape is another one. The plan is unchanged.

        Example:
            >>> plan = prepare_split([0, 1, 2, 0], 3, 2)
            >>> plan.update([0, 1, 2, 1])
            >>> plan.equal
            tensor([1.0000, 0.5000, 1.0000, 0.5000])
        """
        given, shape = _as_map(phy2log), tuple(self.expert.shape)
        if given.shape != shape:
            raise ValueError(f"phy2log has the shape {given.shape}; that of the plan is {shape}")
        num_gpus, max_replicas = self.gpu_entries.shape[-2], self.row_entries.shape[-1]
        new = prepare_split(
            given, self.num_experts, num_gpus, max_replicas=max_replicas, device="cpu"
        )
        for mine, other in zip(self[:-1], new[:-1], strict=True):
            mine.copy_(other)


def prepare_split(
    phy2log: Any,
    num_experts: int,
    num_gpus: int,
    *,
    max_replicas: int | None = None,
    device: torch.device | str | None = None,
) -> SplitPlan:
    """What `split_load`, `quotas` and `to_physical` need of a plan, once per plan.

    Runs on the host and waits for `phy2log`. Shapes depend on those of the arguments only, so
    `SplitPlan.update` takes any later plan of the same shape.

    Args:
        phy2log: The expert in every slot, [L, R] or [R], -1 in empty slots: a tensor, a NumPy array
            or a list, of integers.
        num_experts: E.
        num_gpus: G; divides R. GPU g has the slots from g * R / G.
        max_replicas: X, the maximum number of replicas of an expert in this plan and later ones,
            the width of tables; None: R - E + 1, which every plan respects. A small one saves
            memory and, on a GPU, time: G where no GPU holds an expert twice.
        device: Of the result; None: that of `phy2log`.

    Returns:
        The plan, with tensors on `device`.

    Raises:
        TypeError: phy2log does not hold integers, or a number is not an integer.
        ValueError: A number or a shape is out of range, an expert has no slot, or more than
            `max_replicas`.

    Example:
        >>> prepare_split(torch.tensor([0, 1, 2, 0]), num_experts=3, num_gpus=2).equal
        tensor([0.5000, 1.0000, 1.0000, 0.5000])
    """
    if device is None:
        device = phy2log.device if isinstance(phy2log, torch.Tensor) else "cpu"
    phy2log = _as_map(phy2log)
    num_slots = phy2log.shape[-1]
    _check_integer("num_experts", num_experts, 1, num_slots, "slots")
    _check_integer("num_gpus", num_gpus, 1, num_slots, "slots")
    if num_slots % num_gpus:
        divisors = [x for x in range(1, num_slots + 1) if num_slots % x == 0]
        nearest = min(divisors, key=lambda x: abs(x - num_gpus))
        raise ValueError(f"num_gpus={num_gpus} does not divide {num_slots} slots; {nearest} does")
    experts = phy2log.reshape(-1, num_slots)
    count = _count_replicas(experts, num_experts)
    width = num_slots - num_experts + 1
    if max_replicas is not None:
        _check_integer("max_replicas", max_replicas, 1)
        for layer, expert in np.argwhere(count > max_replicas)[:1]:
            raise ValueError(
                f"max_replicas={max_replicas}, but phy2log has {count[layer, expert]} slots for "
                f"expert {expert} in layer {layer}; use at least {count.max()}"
            )
        width = min(max_replicas, width)
    tables = _tables(experts, count, num_gpus, width)
    leading = phy2log.shape[:-1]
    with torch.inference_mode(False):  # or `update` would fail outside of it
        tensors = (torch.from_numpy(x.reshape(*leading, *x.shape[1:])).to(device) for x in tables)
        return SplitPlan._make([*tensors, num_experts])


def _tables(
    experts: np.ndarray, count: np.ndarray, num_gpus: int, width: int
) -> tuple[np.ndarray, ...]:
    """The tensors of a `SplitPlan`, in their order."""
    (num_layers, num_slots), num_experts = experts.shape, count.shape[1]
    num_rows = min(num_slots - num_experts, num_experts)
    num_entries = min(2 * (num_slots - num_experts), num_slots)
    layer = np.arange(num_layers)[:, None]
    expert = np.where(experts < 0, num_experts, experts)
    count = np.concatenate([count, np.zeros_like(count[:, :1])], axis=1)  # of no expert

    order = np.argsort(expert, axis=1, kind="stable")
    start = np.cumsum(count, axis=1) - count
    in_order = np.take_along_axis(expert, order, axis=1)
    rank = np.empty_like(expert)
    rank[layer, order] = np.arange(num_slots) - np.take_along_axis(start, in_order, axis=1)

    replicas = np.take_along_axis(count, expert, axis=1)
    layer_of, slot_of = np.nonzero(replicas > 1)
    place = (np.cumsum(replicas > 1, axis=1) - 1)[layer_of, slot_of]
    row_of = (np.cumsum(count > 1, axis=1) - 1)[layer_of, expert[layer_of, slot_of]]
    rank_of, gpu_of = rank[layer_of, slot_of], slot_of // (num_slots // num_gpus)
    entry = np.full((num_layers, num_slots), num_entries)
    entry[layer_of, slot_of] = place
    slot, row, gpu = np.zeros((3, num_layers, num_entries + 1), np.int64)
    slot[layer_of, place], row[layer_of, place], gpu[layer_of, place] = slot_of, row_of, gpu_of
    used = np.zeros((num_layers, num_entries + 1), np.float32)
    used[layer_of, place] = 1
    row_expert = np.zeros((num_layers, num_rows), np.int64)
    row_expert[layer_of, row_of] = expert[layer_of, slot_of]
    row_entries = np.full((num_layers, num_rows, width), num_entries)
    row_entries[layer_of, row_of, rank_of] = place
    cell = np.full((num_layers, num_slots), num_rows * width)
    cell[layer_of, slot_of] = row_of * width + rank_of
    return (
        np.where(experts < 0, 0, experts),
        np.where(replicas > 0, 1 / np.maximum(replicas, 1), 0).astype(np.float32),
        replicas == 1,
        entry,
        slot,
        row,
        gpu,
        used,
        row_expert,
        row_entries,
        entry.reshape(num_layers, num_gpus, -1),
        cell,
        order,
        in_order << 32,
    )


def _as_map(phy2log: Any) -> np.ndarray:
    """A map on the host, int64 [L, R] or [R]."""
    if isinstance(phy2log, torch.Tensor):
        phy2log = phy2log.detach().cpu().numpy()
    array = np.asarray(phy2log)
    if array.dtype.kind not in "iu":
        raise TypeError(f"phy2log must hold integers, got dtype {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"phy2log must have the shape [L, R] or [R], got {array.shape}")
    return array.astype(np.int64)


def _count_replicas(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """The replicas of every expert, [L, E]; raises ValueError for an invalid plan."""
    for layer, slot in np.argwhere((experts < -1) | (experts >= num_experts))[:1]:
        raise ValueError(
            f"phy2log at layer {layer}, slot {slot} is {experts[layer, slot]}; experts are "
            f"numbered 0 to {num_experts - 1}, and -1 is none"
        )
    held, layer = experts >= 0, np.arange(len(experts))[:, None]
    key = (layer * num_experts + experts)[held]
    count = np.bincount(key, minlength=len(experts) * num_experts).reshape(-1, num_experts)
    for layer, expert in np.argwhere(count == 0)[:1]:
        raise ValueError(f"phy2log has no slot for expert {expert} in layer {layer}")
    return count


def _check_integer(
    name: str, value: Any, least: int, most: int | None = None, unit: str = ""
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}={value}; use at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value}, but there are {most} {unit}; use at most {most}")


def check_shape(name: str, value: torch.Tensor, plan: SplitPlan, last: int) -> None:
    """Raise ValueError unless a tensor has the layers of the plan and a last axis of this size."""
    wanted = (*plan.expert.shape[:-1], last)
    if value.shape != wanted:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}; the plan wants {wanted}")


def check_integers(name: str, value: torch.Tensor) -> None:
    """Raise TypeError unless a tensor holds integers."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got dtype {value.dtype}")


def pick_entries(values: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The values of a table of entries: float32 [*L, W + 1] at [*L, m, c] is [*L, m, c]."""
    return values.gather(-1, entries.flatten(-2)).unflatten(-1, entries.shape[-2:])
