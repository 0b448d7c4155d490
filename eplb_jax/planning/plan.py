"""The whole plan: groups to nodes, replicas within nodes, replicas to GPUs."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.checks import (
    LoadLike,
    as_count,
    as_key,
    as_limit,
    as_penalty,
    check_multiple,
)
from eplb_jax.planning.forecast import (
    as_load_or_history,
    as_weights,
    forecast_of,
    layers_and_experts,
)
from eplb_jax.planning.history import History
from eplb_jax.planning.per_node import fresh_plan
from eplb_jax.planning.placement import (
    as_placement,
    count_replicas,
    place,
    ranks_in,
    ranks_listed,
)
from eplb_jax.planning.policy import Policy, is_hierarchical, resolve_policy
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_jax.sharding import by_layers
from eplb_jax.transition.local_search import improve_plan, plan_cost
from eplb_jax.transition.relabel import relabel
from eplb_jax.types import Placement, Replication, Topology, check_topology


def plan(
    load: LoadLike | History,
    topology: Topology,
    *,
    weights: LoadLike | Literal["equal"] | None = None,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    max_moves: int | None = None,
    move_penalty: float | None = None,
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
        previous: The plan in place, or its phy2log. Nodes, GPUs of a node and slots of a GPU are
            numbered so that as many slots as possible keep their expert; under the global
            policy, among equals, so that experts that move stay on their node. GPU loads are
            the same as without it.
        max_moves: Per layer, the maximum number of slots that receive an expert from another GPU.
            The plan is then made from `previous` by a local search (see
            `eplb_jax.transition.local_search`); 0 keeps it as it is.
        move_penalty: Imbalance (max / mean GPU load - 1) that a move must gain: the same local
            search, for the least imbalance + move_penalty * moves. With max_moves=None the number
            of moves is unlimited.
        check: Whether to reject loads that are NaN, infinite or negative. Checking a JAX array
            waits for its device; without it such loads count as inside `jax.jit`.

    Returns:
        The plan: the expert in every slot, int32 [L, R]; the slots of every expert, int32
        [L, E, R - E + 1] padded with -1; the replicas of every expert, int32 [L, E]. Without L for
        one layer.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Load, topology and policy do not fit, a name is not known, a load is NaN,
            infinite or negative, `previous` has another shape or lacks an expert, `max_moves` or
            `move_penalty` is negative or given without `previous`, or `weights` are not one
            positive sum for the windows of an array.

    Example:
        >>> result = plan([[90, 30, 20, 10]], Topology(3, slots=2))
        >>> result.phy2log.tolist(), result.logcnt.tolist()
        ([[0, 3, 0, 3, 1, 2]], [[2, 1, 1, 2]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): `rebalance_experts`.
    """
    options = {"weights": weights, "policy": policy, "strategy": strategy, "key": key}
    options["check"] = check
    options |= {"previous": previous, "max_moves": max_moves, "move_penalty": move_penalty}
    return place(plan_replicas(load, topology, **options))


def rebalance_experts(
    weight: LoadLike | History,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
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
    return place(_plan_replicas(load, topology, "weight", policy=policy, **options))


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
        return _plan_replicas(array, topology, "load", **options)
    if options.get("previous") is not None:
        old = as_placement(options["previous"], "previous", array.size)
        options["previous"] = Placement(*(x[None] for x in old))
    one = _plan_replicas(array[None], topology, "load", **options)
    return Replication(*(x[0] for x in one))


def _plan_replicas(
    load: Array | np.ndarray | History,
    topology: Topology,
    name: str,
    *,
    weights: LoadLike | Literal["equal"] | None = None,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    max_moves: int | None = None,
    move_penalty: float | None = None,
) -> Replication:
    """The checks of `plan`, and the choice of what to run. Loads are checked already."""
    num_layers, num_experts = layers_and_experts(load)
    check_topology(topology)
    hierarchical = is_hierarchical(topology, policy, num_experts)
    search = topology if hierarchical else Topology(topology.num_gpus, topology.slots)
    seen = load, as_weights(weights, load), as_key(key)
    fresh = partial(fresh_plan, *seen, topology=search, strategy=resolve_strategy(strategy))
    if previous is None:
        for limit, value in (("max_moves", max_moves), ("move_penalty", move_penalty)):
            if value is not None:
                raise ValueError(f"{limit} needs previous, the plan in place, got None")
        return fresh()
    old = as_placement(previous, "previous", num_experts)
    wanted = num_layers, topology.num_replicas
    if old.phy2log.shape != wanted or old.logcnt.shape[-1] != num_experts:
        raise ValueError(
            f"previous must have the shape [layers, slots] = {wanted} and {num_experts} experts, "
            f"got {old.phy2log.shape} and {old.logcnt.shape[-1]} beside {name}"
        )
    nodes = {"topology": topology, "hierarchical": hierarchical}
    if max_moves is None and move_penalty is None:
        return relabel(fresh(), old.phy2log, **nodes)
    most = as_limit("max_moves", topology.num_replicas if max_moves is None else max_moves)
    penalty = as_penalty("move_penalty", 0.0 if move_penalty is None else move_penalty)
    return _limited(*seen, old, most, penalty, strategy=resolve_strategy(strategy), **nodes)


@by_layers
@partial(jax.jit, static_argnames=("topology", "hierarchical", "strategy"))
def _limited(
    load: Float[Array, "*T L E"] | History,
    weights: Float[Array, " T"] | None,
    key: Key[Array, ""] | None,
    old: Placement,
    max_moves: Int32[Array, ""],
    penalty: Float[Array, ""],
    *,
    topology: Topology,
    hierarchical: bool,
    strategy: Strategy,
) -> Replication:
    """The plan in place, improved within limits.

    With one window, a new plan, relabelled, replaces it where that is better within the same
    limits. With several windows, such a plan would fit them better and the next window worse: the
    old plan was made from windows before them.
    """
    forecast = forecast_of(load, weights, summed=not strategy.distinct)
    nodes = {"topology": topology, "hierarchical": hierarchical}
    windows = forecast.load[:, None] if forecast.windows is None else forecast.windows
    expert, cost = improve_plan(windows, old.phy2log, max_moves, penalty, **nodes)
    if forecast.windows is None:
        search = topology if hierarchical else Topology(topology.num_gpus, topology.slots)
        new = fresh_plan(load, weights, key, topology=search, strategy=strategy)
        fresh = relabel(new, old.phy2log, **nodes).phy2log
        moves, fresh_cost = plan_cost(windows, fresh, old.phy2log, penalty, topology=topology)
        better = (moves <= max_moves) & (fresh_cost < cost)
        expert = jnp.where(better[:, None], fresh, expert)
    same = jnp.all(expert == old.phy2log, axis=1, keepdims=True)
    rank = jnp.where(same, ranks_listed(old), ranks_in(expert))
    return Replication(expert, rank, count_replicas(expert, forecast.load.shape[1]))
