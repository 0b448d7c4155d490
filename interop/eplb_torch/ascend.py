"""vllm-ascend: plans for its dynamic expert-parallel load balancer.

Call `install()` in the process that plans, before vllm-ascend makes its policy. Options are
environment variables, too: see `eplb_torch.memory`.
"""

import logging
from typing import Any

import numpy as np
import torch

import eplb_jax
from eplb_torch.eplb import rebalance_experts
from eplb_torch.memory import Memory, Options, options_of_environment

_logger = logging.getLogger(__name__)


class EplbPolicy:
    """A policy of vllm-ascend.

    Every expert that stays on a GPU keeps its slot, and no expert is on a GPU twice, as
    vllm-ascend demands of a new table.
    """

    def __init__(self, config: Any = None, *, options: Options | None = None) -> None:
        """Plan with these options.

        Args:
            config: vllm-ascend's configuration. The node of a GPU follows from its
                `num_die_per_host`, but does not matter without groups of experts, which
                vllm-ascend does not hand on. So nothing of it is used.
            options: How to plan; None: those of the environment.
        """
        self._options = options_of_environment() if options is None else options
        self._memory = Memory()
        self._num_gpus: int | None = None

    def set_new_ep_size(self, new_ep_size: int) -> None:
        """Plan the next table for so many GPUs: the first ones stay."""
        self._num_gpus = int(new_ep_size)

    def rebalance_experts(
        self, current_expert_table: Any, expert_workload: Any
    ) -> tuple[bool, np.ndarray, np.ndarray]:
        """Plan from the load of every slot.

        Args:
            current_expert_table: The expert in every slot of the plan in place, [L, G, slots of a
                GPU]; -1 for an empty slot.
            expert_workload: The load of every slot, of the same shape, or of several windows,
                [T, L, G, slots of a GPU], the oldest first; -1 for a slot that was not measured.

        Returns:
            Whether any layer changes; the layers that do, by descending gain per move; the new
            table, int64 [L, G, slots of a GPU]. Where no plan can be made of the load, such as one
            with NaN, that is logged and nothing changes.

        Raises:
            ValueError: The table and the load do not fit each other, or there are fewer slots than
                experts.
        """
        table, load = np.asarray(current_expert_table), np.asarray(expert_workload)
        load = load[None] if load.ndim == 3 else load
        if table.ndim != 3 or load.ndim != 4 or (load.shape[1], load.shape[3]) != table.shape[::2]:
            raise ValueError(
                f"current_expert_table of the shape {table.shape} and expert_workload of the shape "
                f"{np.shape(expert_workload)} must be [layers, GPUs, slots] and the same, or with "
                "windows before"
            )
        # While GPUs come or go, either may be as wide as the larger number of them.
        known = min(table.shape[1], load.shape[2])
        table, load = table[:, :known], load[:, :, :known]
        num_layers, _, slots = table.shape
        num_gpus = known if self._num_gpus is None else self._num_gpus
        self._num_gpus = None
        old = torch.from_numpy(table.reshape(num_layers, -1).astype(np.int64))
        counts = num_gpus * slots, 1, 1, num_gpus
        tokens = _tokens_of_experts(table, load)
        try:
            seen = torch.from_numpy(tokens)
            if self._options.remember:
                seen = self._memory.observe(seen, counts)
            phy2log, _, _ = rebalance_experts(
                seen,
                *counts,
                strategy=self._options.strategy,
                previous=old,
                **self._options.limits,
            )
        except ValueError as error:
            if num_gpus != known:
                raise
            _logger.warning("no plan was made, the old table stays: %s", error)
            return False, np.zeros(0, np.int64), table
        new = phy2log.cpu().numpy()
        if num_gpus != known:
            return True, np.arange(num_layers), new.reshape(num_layers, num_gpus, slots)
        moved = (new != old.numpy()).sum(axis=1)
        before, after = (
            np.asarray(eplb_jax.metrics.balance(tokens, x, num_gpus).imbalance).mean(axis=0)
            for x in (old.numpy(), new)
        )
        order = np.argsort(-(before - after) / np.maximum(moved, 1), kind="stable")
        changed = order[moved[order] > 0]
        return bool(changed.size), changed, new.reshape(table.shape)


def _tokens_of_experts(table: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Tokens of every expert, [T, L, E], from those of every slot; 0 where nothing was measured."""
    num_experts = int(table.max()) + 1
    layer = np.arange(len(table))[:, None, None]
    bins = np.where(table < 0, num_experts, table) + layer * (num_experts + 1)
    load = np.where((table < 0) | (load < 0), 0, load).astype(np.float64)
    size = len(table) * (num_experts + 1)
    sums = [np.bincount(bins.ravel(), x.ravel(), size) for x in load]
    return np.stack(sums).reshape(len(load), len(table), -1)[..., :num_experts]


def install(*, options: Options | None = None) -> None:
    """Make vllm-ascend plan with `EplbPolicy`, whichever policy its configuration names.

    Args:
        options: How to plan; None: those of the environment.

    Raises:
        ImportError: vllm-ascend is not installed.
        ValueError: An option of the environment is not known.
    """
    from vllm_ascend.eplb.core.policy.policy_factory import (  # pyright: ignore[reportMissingImports]
        PolicyFactory,
    )

    chosen = options_of_environment() if options is None else options

    def generate_policy(policy_type: int, config: Any = None) -> EplbPolicy:
        return EplbPolicy(config, options=chosen)

    PolicyFactory.generate_policy = staticmethod(generate_policy)
