"""Whether groups of experts are kept on nodes."""

import warnings
from typing import Literal, get_args

from eplb_jax.checks import check_divides
from eplb_jax.packing.balanced_packing import check_size
from eplb_jax.types import Topology, check_experts

Policy = Literal["auto", "global", "hierarchical"]
"""Whether groups of experts are kept on nodes: see `plan`."""


def resolve_policy(
    policy: str, num_groups: int, num_nodes: int
) -> Literal["global", "hierarchical"]:
    """The policy that "auto" stands for: hierarchical exactly if num_nodes divides num_groups."""
    if policy not in get_args(Policy):
        known = ", ".join(get_args(Policy))
        raise ValueError(f"policy={policy!r} is not known; choose one of: {known}")
    if policy == "auto":
        policy = "global" if num_groups % num_nodes else "hierarchical"
    return "global" if policy == "global" else "hierarchical"


def is_hierarchical(topology: Topology, policy: str, num_experts: int) -> bool:
    """Whether groups are packed to nodes; raises ValueError where topology and experts misfit."""
    num_groups, num_nodes = topology.num_groups, topology.num_nodes
    check_experts(topology, num_experts)
    if policy == "auto" and not topology.is_uniform:
        policy = "global"
    if resolve_policy(policy, num_groups, num_nodes) == "global":
        if topology.is_uniform:
            check_size(topology.num_replicas, topology.num_gpus)
        return False
    check_divides("num_groups", num_groups, "number of experts", num_experts)
    check_divides("num_nodes", num_nodes, "num_groups", num_groups, otherwise='policy="global"')
    if not topology.is_uniform:
        raise ValueError(
            "the hierarchical policy needs GPUs with equally many slots and nodes of equal size; "
            'nearest: policy="global"'
        )
    check_size(topology.num_replicas // num_nodes, topology.gpus_per_node)
    gpus, experts = topology.gpus_per_node, num_experts // num_nodes
    useless = topology.num_replicas // num_nodes - experts * gpus
    if useless > 0 and num_nodes > 1:
        warnings.warn(
            f"{useless} slots of every node do nothing: its {gpus} GPUs have more slots than its "
            f'{experts} experts; policy="global" uses them',
            stacklevel=4,
        )
    return num_nodes > 1
