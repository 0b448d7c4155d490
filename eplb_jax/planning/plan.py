"""The whole plan: groups to nodes, replicas within nodes, replicas to GPUs."""

from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Array, Key
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_count, check_multiple
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.forecast import as_load_or_history, layers_and_experts
from eplb_jax.planning.history import History
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.planning.placement import as_placement, place
from eplb_jax.planning.plan_options import plan_checked
from eplb_jax.planning.policy import Policy, resolve_policy
from eplb_jax.planning.strategies import Strategy
from eplb_jax.types import Placement, Replication, Topology


def plan(
    load: LoadLike | History,
    topology: Topology,
    *,
    weights: LoadLike | Literal["equal"] | None = None,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    previous_gpus: Sequence[int] | None = None,
    active: ArrayLike | Array | None = None,
    speed: ArrayLike | Array | None = None,
    tolerance: float | None = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    split: Literal["flexible"] | None = None,
    cost: Cost | None = None,
    check: bool = True,
) -> Placement:
    """Choose the expert of every physical slot, from measured loads.

    Given several past windows or a history, the plan is made for the next one: GPUs are balanced in
    every window and in a prediction (see `eplb_jax.planning.forecast`). A window weighs by its
    evidence: its tokens, as far as sampling noise explains how windows differ, or as much as any
    other where traffic does; all-zero windows say nothing. Strategies whose refinement does not use
    windows (all but "auto", "fast" and "best") plan for their weighted mean, "greedy" for their
    sum.

    The hierarchical policy keeps every group of experts on one node, as group-limited routing
    wants it: it packs groups to nodes, gives every node the same number of spare slots, and packs
    replicas to the GPUs of their node. The global policy ignores groups.

    No GPU holds an expert twice where exchanges can avoid it; an expert gets at most as many
    replicas as there are GPUs for it, unless GPUs have more slots than there are experts. In a
    layer without load, spare slots are spread over distinct experts and over GPUs.
    ``strategy="greedy"`` guarantees neither: its plan is DeepSeek's, slot for slot, with ties to
    the lowest index. Deterministic: the plan of a layer is the same, bit for bit, on every rank and
    whichever other layers are planned with it. Inside `jax.jit`, NaN and negative loads count as
    zero and infinite ones as the largest float32.

    Args:
        load: Tokens per expert in any unit: [L, E], [T, L, E] of T past windows, oldest first, or
            [E] of one layer. Anything `jnp.asarray` takes. Or an `eplb_jax.History`; more than 8
            windows are planned for as the history after them.
        topology: GPUs, slots, nodes and groups; num_groups divides E, and there are at least E
            slots. The hierarchical policy needs num_nodes to divide num_groups.
        weights: Weight of every window, [T], or "equal"; None: by evidence. A history has its own.
        policy: "global", "hierarchical", or "auto": hierarchical exactly if num_nodes divides
            num_groups.
        strategy: How hard to search: a name from `eplb_jax.STRATEGIES` or a `Strategy`.
        key: For strategies that draw at random. None: a fixed key.
        previous: The plan in place, or its phy2log: the next plan starts from it. A layer without
            load keeps it. It may have -1 in slots without an expert, and another number of GPUs.
        previous_gpus: For every GPU the number that it had in `previous`, -1 for a new one. None:
            the same numbers; GPUs past the end of `previous` are new.
        active: Whether every GPU is alive, [G]. The others hold -1. Live GPUs hold all experts;
            inside `jax.jit`, where too few slots are no error, as many as they can.
        speed: Tokens per second of every GPU, [G], in any unit: load / speed is balanced.
        tolerance: How much worse than a new plan the next one may be so that fewer experts move:
            this fraction of 1 % + the imbalance that a new plan has on the same loads. A layer
            within it keeps its plan, any other gets a near plan within it, or, where the nearest
            one found is not within twice of it, the new plan.
            None: the new plan in any case, with its nodes, GPUs and slots numbered so that as many
            slots as possible keep their expert.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU;
            0 keeps the plan in place. None: no limit. Experts that have no slot come on top.
        move_penalty: Imbalance (max / mean GPU load - 1) that a move must gain.
        split: "flexible": a plan for tokens that replicas share as the load at hand wants
            (`runtime.split_load`). In these windows it is never worse for that than the plan it
            starts from: one for equal shares, or `previous`, which changes where a window is more
            than `tolerance` times 1 % above the mean. GPUs must be alive and equal; with more than
            8, plans as good may differ with the layers planned beside. None: a plan for replicas
            that share the load of their expert equally.
        cost: What tokens and active experts cost: GPUs are balanced by time, and a slot holds -1
            where another replica would cost more than it relieves. GPUs must be alive and equal;
            of the limits only `tolerance` applies. None, or a cost of tokens alone: tokens.
        check: Whether to reject loads that are NaN, infinite or negative. Checking a JAX array
            waits for its device; without it such loads count as inside `jax.jit`.

    Returns:
        The plan: the expert in every slot, int32 [L, R]; the slots of every expert, int32
        [L, E, R - E + 1] padded with -1; the replicas of every expert, int32 [L, E]. Without L for
        one layer.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load, topology and policy do not fit, a name is not known, a load is NaN,
            infinite or negative, `previous` does not fit, a limit is negative or given without
            `previous`, live GPUs have too few slots, or `weights` are not one positive sum for the
            windows of an array.

    Example:
        >>> result = plan([[90, 30, 20, 10]], Topology(3, slots=2))
        >>> result.phy2log.tolist(), result.logcnt.tolist()
        ([[0, 3, 0, 3, 1, 2]], [[2, 1, 1, 2]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): `rebalance_experts`.
    """
    options = {"weights": weights, "policy": policy, "strategy": strategy, "key": key}
    options |= {"previous": previous, "previous_gpus": previous_gpus, "check": check}
    options |= {"active": active, "speed": speed, "tolerance": tolerance}
    options |= {"max_moves": max_moves, "move_penalty": move_penalty}
    options |= {"split": split, "cost": cost}
    return place(plan_replicas(load, topology, **options))


def rebalance_experts(
    weight: LoadLike | History,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
    cost: Cost | None = None,
    **options: Any,
) -> Placement:
    """`plan` with DeepSeek's arguments, names and order.

    Args:
        weight: The load of `plan`, [L, E] or [T, L, E], or a history.
        num_replicas: R, physical slots of a layer; a multiple of num_gpus, at least E.
        num_groups: Groups of consecutive experts; divides E.
        num_nodes: N; divides num_gpus and, for the hierarchical policy, num_groups.
        num_gpus: G, over all nodes.
        policy: "auto", "global" or "hierarchical".
        cost: As of `plan`.
        **options: The other keyword arguments of `plan`. ``strategy="greedy"`` gives DeepSeek's
            plan, slot for slot.

    Returns:
        The plan, which unpacks as DeepSeek's (phy2log, log2phy, logcnt).

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `plan`.

    Example:
        >>> phy2log, log2phy, logcnt = rebalance_experts([[90, 30, 20, 10]], 6, 1, 1, 3)
        >>> phy2log.tolist(), logcnt.tolist()
        ([[0, 3, 0, 3, 1, 2]], [[2, 1, 1, 2]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): the function of this name.
    """
    load = as_load_or_history(weight, "weight", least_axes=2, check=options.pop("check", True))
    num_replicas = as_count("num_replicas", num_replicas)
    num_gpus, num_nodes = as_count("num_gpus", num_gpus), as_count("num_nodes", num_nodes)
    check_multiple(
        "num_replicas", num_replicas, "num_gpus", num_gpus, least=layers_and_experts(load)[1]
    )
    num_groups = as_count("num_groups", num_groups)
    if num_gpus % num_nodes and resolve_policy(policy, num_groups, num_nodes) == "global":
        num_nodes = 1  # the global policy needs no nodes
    topology = Topology(num_gpus, num_replicas // num_gpus, num_nodes, num_groups)
    return place(plan_checked(load, topology, "weight", policy=policy, cost=cost, **options))


def plan_replicas(load: LoadLike | History, topology: Topology, **options: Any) -> Replication:
    """`plan`, with the rank of every replica in place of the large `log2phy`.

    Args:
        load: As of `plan`, and so are all that follow.
        topology: GPUs, slots, nodes and groups.
        **options: The keyword arguments of `plan`.

    Returns:
        The expert in every slot and the rank of that replica among those of its expert, each
        int32 [L, R], and the replicas of every expert, int32 [L, E]. Without L for one layer.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `plan`.

    Example:
        >>> plan_replicas([[90, 30, 20, 10]], Topology(3, slots=2)).rank.tolist()
        [[1, 1, 0, 0, 0, 0]]
    """
    array = as_load_or_history(load, "load", check=options.pop("check", True))
    if isinstance(array, History) or array.ndim > 1:
        return plan_checked(array, topology, "load", **options)
    if options.get("previous") is not None:
        old = as_placement(options["previous"], "previous", array.size)
        options["previous"] = Placement(*(x[None] for x in old))
    one = plan_checked(array[None], topology, "load", **options)
    return Replication(*(x[0] for x in one))
