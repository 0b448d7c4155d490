"""LightLLM's redundant experts, and the loads of ADRS."""

import numpy as np

from eplb_jax.formats.sources import Source
from eplb_jax.formats.types import Format, PlanFile, Recording, numbered

_REDUNDANT = "redundancy_expert_num"


def _is_history(source: Source) -> bool:
    return source.kind == "json" and "load_history" in source.keys


def _read_history(source: Source) -> Recording:
    """Windows are entries."""
    load = np.array([x["logical_expert_load"] for x in source.content["load_history"]])
    return Recording(load, numbered(load.shape[1] if load.ndim == 3 else 0))


def _is_redundant(source: Source) -> bool:
    return source.kind == "json" and _REDUNDANT in source.keys


def _refuse_redundant(source: Source) -> PlanFile:
    raise ValueError(
        "it lists experts that every GPU holds beside its own, but neither experts nor GPUs; and a "
        "plan, where GPUs hold different ones, cannot be written so"
    )


FORMATS = (
    Format("adrs", "ADRS's expert-load.json", _is_history, _read_history),
    Format(
        "lightllm",
        "LightLLM's redundant experts, which is no plan: every GPU holds the same ones",
        _is_redundant,
        read_plan=_refuse_redundant,
    ),
)
