"""Balance by the definitions of engines."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from eplb_jax.checks import LoadLike
from eplb_jax.evaluation.metrics import gpu_loads
from eplb_jax.types import Placement, Topology

_SGLANG_ADDS = 1e-5
"""What SGLang adds to mean and max."""


class EngineMetrics(NamedTuple):
    """What engines would report for every window, float64 [T], or [] for one window.

    SGLang and vLLM report every forward pass, TensorRT-LLM the mean over iterations: the last two
    fields, `.mean()`. A window of many passes is more balanced than they are.

    Attributes:
        sglang_balancedness: Mean over layers of mean / max GPU load, as in sglang:eplb_balancedness
            and its server log. Layers without load count as 1.
        vllm_balancedness: Sum over layers of mean / sum over layers of max GPU load, as in the log
            line "EPLB step". 0 without any load.
        tensorrt_llm_imbalance: Mean over layers of max / mean GPU load - 1: "imbalance-ratio".
            Layers without load are left out; 0 if there are no others.
        tensorrt_llm_std: Mean over layers of the standard deviation of GPU loads, in tokens: "std".
            Layers without load count as 0.
    """

    sglang_balancedness: Float[np.ndarray, "*T"]
    vllm_balancedness: Float[np.ndarray, "*T"]
    tensorrt_llm_imbalance: Float[np.ndarray, "*T"]
    tensorrt_llm_std: Float[np.ndarray, "*T"]


def engine_metrics(
    load: LoadLike, placement: Placement | LoadLike, topology: Topology | int
) -> EngineMetrics:
    """The balance of a plan by the definitions of engines, to compare with what they report.

    All GPUs count, dead ones too. The standard deviation of one GPU, NaN in TensorRT-LLM, is 0.
    Runs on the host and cannot be traced.

    Args:
        load: Tokens, [L, E] or [T, L, E], or [E] of one layer.
        placement: The plan, or its phy2log.
        topology: GPUs and slots, or the number of GPUs.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `balance`.

    Example:
        >>> result = engine_metrics([[100, 300], [50, 50], [0, 0]], [[0, 1]] * 3, 2)
        >>> [round(float(x), 3) for x in result]
        [0.889, 0.714, 0.25, 47.14]

    References:
        SGLang 0.5.23, `srt/eplb/expert_distribution.py`. vLLM 0.33, `distributed/eplb/
        eplb_state.py`; older releases took layers for ranks. TensorRT-LLM, `examples/wide_ep/
        ep_load_balancer/report_load_statistics.py`.
    """
    loads = np.asarray(gpu_loads(load, placement, topology), np.float64)
    loads = loads[None] if loads.ndim == 1 else loads
    mean, most = loads.mean(axis=-1), np.maximum(loads.max(axis=-1), loads.mean(axis=-1))
    busy = most > 0
    total = most.sum(axis=-1)
    over = np.where(busy, most / np.where(busy, mean, 1) - 1, 0)
    spread = loads.std(axis=-1, ddof=1) if loads.shape[-1] > 1 else np.zeros_like(mean)
    return EngineMetrics(
        ((mean + _SGLANG_ADDS) / (most + _SGLANG_ADDS)).mean(axis=-1),
        mean.sum(axis=-1) / np.where(total > 0, total, 1),
        over.sum(axis=-1) / np.maximum(busy.sum(axis=-1), 1),
        spread.mean(axis=-1),
    )
