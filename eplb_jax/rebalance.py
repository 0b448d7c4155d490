"""The whole plan: groups to nodes, replicas within nodes, replicas to GPUs."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.budget import plan_cost, within_budget
from eplb_jax.forecast import forecast_of, gathered
from eplb_jax.node import placed_in_node, taken
from eplb_jax.packing.balanced import check_size
from eplb_jax.packing.lanes import along
from eplb_jax.packing.search import packs
from eplb_jax.packing.strategy import Strategy, resolve
from eplb_jax.placement import counted, place, ranks_in, ranks_listed
from eplb_jax.relabel import relabelled
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement, Replication
from eplb_jax.validation import (
    LoadLike,
    as_count,
    as_experts,
    as_key,
    as_limit,
    as_load,
    as_price,
    check_complete,
    check_divides,
    check_multiple,
    fixed_if_none,
)

Policy = Literal["auto", "global", "hierarchical"]
POLICIES: tuple[Policy, ...] = ("auto", "global", "hierarchical")


def rebalance_experts(
    weight: LoadLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    max_moves: int | None = None,
    price: float = 0.0,
) -> Placement:
    """Plan where the replicas of every expert lie, from measured loads.

    Of several past windows `weight` holds one load each, and the plan is made for the next one: the
    replicas are spread so that GPUs are even in every window and in a prediction (see
    `eplb_jax.forecast`). What a window adds up to means nothing, and one of zeros counts for
    nothing. Strategies whose refinement does not see windows (all but "auto", "fast" and "best")
    plan for the middle of them, and "greedy" for their sum.

    The hierarchical policy keeps every group of experts on one node, as group-limited routing
    wants it: it packs groups to nodes, gives every node the same number of spares, and packs
    replicas to the GPUs of their node. The global policy knows neither groups nor nodes.

    No GPU holds an expert twice where exchanges can avoid it; an expert gets at most as many
    replicas as there are GPUs for it, unless GPUs have more slots than there are experts. A layer
    without load has its spares spread over distinct experts and evenly over GPUs.
    ``strategy="greedy"`` promises neither: its plan is DeepSeek's, slot for slot, ties going to
    the lowest index.
    Deterministic: the same input gives the same plan, bit for bit. Inside `jax.jit`, NaN and
    negative loads count as zero and infinite ones as the largest float32.

    Args:
        weight: [L, E] loads in any unit (tokens), or [T, L, E] of T windows, oldest first; anything
            `jnp.asarray` takes. Of more than 16 windows consecutive ones are added up.
        num_replicas: R, physical slots of a layer; a multiple of num_gpus, at least E.
        num_groups: Groups of consecutive experts; divides E.
        num_nodes: N; divides num_gpus and, for the hierarchical policy, num_groups.
        num_gpus: G, over all nodes.
        policy: "global", "hierarchical", or "auto": hierarchical exactly when num_nodes
            divides num_groups.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        key: Where the strategy draws at random. None: a fixed key.
        previous: The plan in place, or its phy2log [L, R]. GPUs of a node, and nodes, are named
            so that as many experts as possible stay on their GPU, and those keep their slot;
            loads per GPU are the same as without it. Under the global policy nodes do not count.
        max_moves: At most so many slots of a layer are fetched from another GPU: the plan is made
            from `previous` by the exchanges of two slots and the changes of one that even loads
            most for each copy. 0 keeps `previous` as it is.
        price: What a fetched slot costs in imbalance (heaviest / mean GPU - 1) of its layer: the
            plan is the best on that way in imbalance + price x moves, and None of `max_moves`
            then sets no limit.

    Returns:
        The plan: the expert in every slot, int32 [L, R]; the slots of every expert, int32
        [L, E, R - E + 1] padded with -1; the replicas of every expert, int32 [L, E].

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Numbers do not divide as they must, the policy or strategy is not known,
            `weight` is neither [L, E] nor [T, L, E], a load is NaN, infinite or negative,
            `previous` is of another shape or lacks an expert, or `max_moves` or `price` is negative
            or given without `previous`.

    Example:
        >>> plan = rebalance_experts([[90, 30, 20, 10]], 6, 1, 1, 3)
        >>> plan.phy2log.tolist(), plan.logcnt.tolist()
        ([[0, 3, 0, 3, 1, 2]], [[2, 1, 1, 2]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): the function of this name.
    """
    counts = num_replicas, num_groups, num_nodes, num_gpus
    options = {"policy": policy, "strategy": strategy, "key": key}
    options |= {"previous": previous, "max_moves": max_moves, "price": price}
    return place(place_replicas(weight, *counts, **options))


def place_replicas(
    weight: LoadLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    previous: Placement | LoadLike | None = None,
    max_moves: int | None = None,
    price: float = 0.0,
) -> Replication:
    """`rebalance_experts`, with the rank of every replica in place of the large `log2phy`.

    Arguments and errors are the same.

    Returns:
        The expert in every slot and the rank of that replica among those of its expert, each
        int32 [L, R], and the replicas of every expert, int32 [L, E].
    """
    load = gathered(as_load(weight, "weight", windows=True))
    topology = _topology(load.shape[-1], num_replicas, num_groups, num_nodes, num_gpus, policy)
    options = {"topology": topology, "strategy": resolve(strategy)}
    limited = max_moves is not None or not (isinstance(price, (int, float)) and price == 0)
    if previous is None:
        if limited:
            name = "price" if max_moves is None else "max_moves"
            raise ValueError(f"{name} needs previous, the plan in place, got None")
        return _place_replicas(load, as_key(key), **options)
    shape = load.shape[-2], topology.num_replicas
    old = as_experts(previous, "previous", shape, load.shape[-1])
    if limited:
        check_complete(old, load.shape[-1], "previous")
        most = topology.num_replicas if max_moves is None else max_moves
        limits = as_limit("max_moves", most), as_price("price", price)
        log2phy = previous.log2phy if isinstance(previous, Placement) else None
        return _improved(load, as_key(key), old, log2phy, *limits, **options)
    new = _place_replicas(load, as_key(key), **options)
    return relabelled(new, old, num_gpus=topology.num_gpus, num_nodes=topology.num_nodes)


def resolve_policy(
    policy: Policy, num_groups: int, num_nodes: int
) -> Literal["global", "hierarchical"]:
    """The policy that "auto" stands for: hierarchical exactly when num_nodes divides num_groups."""
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not known; choose one of: {', '.join(POLICIES)}")
    if policy == "auto":
        return "global" if num_groups % num_nodes else "hierarchical"
    return policy


class _Topology(NamedTuple):
    """Checked counts; one group and one node under the global policy."""

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int


def _topology(
    num_experts: int,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    policy: Policy,
) -> _Topology:
    num_replicas = as_count("num_replicas", num_replicas)
    num_groups = as_count("num_groups", num_groups)
    num_nodes = as_count("num_nodes", num_nodes)
    num_gpus = as_count("num_gpus", num_gpus)
    check_multiple("num_replicas", num_replicas, "num_gpus", num_gpus, least=num_experts)
    if resolve_policy(policy, num_groups, num_nodes) == "global":
        num_groups = num_nodes = 1
    check_divides("num_groups", num_groups, "number of experts", num_experts)
    check_divides("num_nodes", num_nodes, "num_groups", num_groups, otherwise='policy="global"')
    check_divides("num_nodes", num_nodes, "num_gpus", num_gpus)
    check_size(num_replicas // num_nodes, num_gpus // num_nodes)
    return _Topology(num_replicas, num_groups, num_nodes, num_gpus)


@by_layers
@partial(jax.jit, static_argnames=("topology", "strategy"))
def _place_replicas(
    weight: Float[Array, "*T L E"],
    key: Key[Array, ""] | None,
    *,
    topology: _Topology,
    strategy: Strategy,
) -> Replication:
    num_replicas, num_groups, num_nodes, num_gpus = topology
    forecast = forecast_of(weight, summed=not strategy.distinct)
    num_layers, num_experts = forecast.load.shape
    group_key, gpu_key = jax.random.split(fixed_if_none(key))

    counts = num_replicas // num_nodes, num_gpus // num_nodes
    if num_nodes == 1:
        return placed_in_node(forecast, *counts, strategy, gpu_key)
    group_size = num_experts // num_groups
    by_group = forecast.map(lambda x: x.reshape(*x.shape[:-1], num_groups, group_size).sum(-1))
    groups = packs(by_group.load, num_nodes, strategy, group_key, windows=by_group.windows)
    experts = groups[..., None] * group_size + jnp.arange(group_size, dtype=jnp.int32)
    experts = experts.reshape(num_layers * num_nodes, num_experts // num_nodes)
    # From here a row is a node of a layer, and its experts go by their place in `experts`.
    of_node = forecast.map(lambda x: taken(jnp.repeat(x, num_nodes, axis=0), experts))
    replicas = placed_in_node(of_node, *counts, strategy, gpu_key)
    phy2log = along(experts, replicas.phy2log, 1).reshape(-1, num_replicas)
    rank = replicas.rank.reshape(-1, num_replicas)
    return Replication(phy2log, rank, counted(phy2log, num_experts))


@by_layers
@partial(jax.jit, static_argnames=("topology", "strategy"))
def _improved(
    weight: Float[Array, "*T L E"],
    key: Key[Array, ""] | None,
    old: Int32[Array, "L R"],
    log2phy: Int32[Array, "L E X"] | None,
    max_moves: Int32[Array, ""],
    price: Float[Array, ""],
    *,
    topology: _Topology,
    strategy: Strategy,
) -> Replication:
    """The plan in place, improved within limits.

    Of one window, a plan from nothing is taken instead where it is better and as near; of several
    it fits them better and the next worse, as the old plan remembers more windows than are given.
    """
    forecast = forecast_of(weight, summed=not strategy.distinct)
    gpus = {"num_gpus": topology.num_gpus, "num_nodes": topology.num_nodes}
    seen = forecast.load[:, None] if forecast.windows is None else forecast.windows
    expert, cost = within_budget(seen, old, max_moves, price, **gpus)
    if forecast.windows is None:
        new = _place_replicas(weight, key, topology=topology, strategy=strategy)
        fresh = relabelled(new, old, **gpus).phy2log
        moves, off = plan_cost(seen, fresh, old, num_gpus=topology.num_gpus)
        better = (moves <= max_moves) & (off + price * moves.astype(jnp.float32) < cost)
        expert = jnp.where(better[:, None], fresh, expert)
    rank = ranks_in(expert)
    if log2phy is not None:
        same = jnp.all(expert == old, axis=1, keepdims=True)
        rank = jnp.where(same, ranks_listed(log2phy, old), rank)
    return Replication(expert, rank, counted(expert, forecast.load.shape[1]))
