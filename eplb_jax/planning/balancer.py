"""The loop of a running service: observe windows, propose a plan, commit it.

Pure functions in the form of an optax optimizer; the state is a pytree that a caller can jit,
shard, donate and save.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_amount, as_count, as_limit
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.gpus import align, as_speed
from eplb_jax.planning.history import (
    RECENT,
    REMEMBERED,
    History,
    init_history,
    update_history,
)
from eplb_jax.planning.history_files import load_tree, save_tree
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.planning.placement import count_replicas, invert_map
from eplb_jax.planning.plan import plan
from eplb_jax.planning.policy import Policy
from eplb_jax.planning.proposal import Proposal, assess
from eplb_jax.planning.strategies import Strategy, resolve_strategy
from eplb_jax.types import Placement, Topology, check_experts, check_topology


class BalancerState(NamedTuple):
    """What a balancer carries from step to step.

    Attributes:
        history: What was seen of the traffic.
        plan: The plan in place.
        age: Number of windows since a plan was committed.
    """

    history: History
    plan: Placement
    age: Int32[Array, ""]


@dataclass(frozen=True)
class Balancer:
    """The functions of `balancer`, with their options. Frozen and hashable.

    Attributes:
        topology: GPUs, slots, nodes and groups.
        policy: As of `eplb_jax.plan`, and so are all that follow but the last two.
        strategy: A strategy.
        tolerance: How much worse than a new plan the next one may be.
        max_moves: Limit of moves per layer.
        move_penalty: Imbalance that a move must gain.
        steps_per_window: Number of calls of `observe` that are one window.
        elastic: Whether GPUs come and go. Otherwise all are alive, and plans are made faster.
        cost: What tokens and active experts cost; None: tokens.
    """

    topology: Topology
    policy: Policy
    strategy: Strategy
    tolerance: float
    max_moves: int | None
    move_penalty: float | None
    steps_per_window: int
    elastic: bool
    cost: Cost | None = None

    def init(
        self,
        num_layers: int,
        num_experts: int,
        *,
        plan: Placement | LoadLike | None = None,
        previous_gpus: tuple[int, ...] | None = None,
        history: History | None = None,
    ) -> BalancerState:
        """The state at the start.

        Args:
            num_layers: L.
            num_experts: E.
            plan: The plan in place, or its phy2log; -1 in slots without an expert, of any number of
                GPUs. None: experts in the order of slots, again from the first one.
            previous_gpus: For every GPU the number that it has in `plan`, as of `eplb_jax.plan`.
            history: What was seen before, for instance with another topology. None: nothing.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: There are fewer slots than experts, or plan or history do not fit.
        """
        num_layers = as_count("num_layers", num_layers, least=0)
        num_experts = as_count("num_experts", num_experts)
        check_experts(self.topology, num_experts)
        if plan is None:
            slots = np.arange(self.topology.num_replicas, dtype=np.int32) % num_experts
            plan = np.broadcast_to(slots, (num_layers, slots.size))
        old = align(plan, self.topology, num_layers, num_experts, previous_gpus)
        if not self.elastic and bool(jnp.any(count_replicas(old, num_experts) == 0)):
            raise ValueError("plan lacks an expert in a layer; nearest: elastic=True")
        seen = init_history(num_layers, num_experts) if history is None else history
        if seen.current.shape != (num_layers, num_experts):
            raise ValueError(
                f"history has the shape {seen.current.shape}, not {(num_layers, num_experts)}"
            )
        return BalancerState(
            seen, invert_map(old, num_experts=num_experts), jnp.zeros((), jnp.int32)
        )

    def observe(self, state: BalancerState, load: LoadLike) -> BalancerState:
        """The state after one more step: [L, E] tokens of every expert. For `jax.jit`, too.

        Raises:
            ValueError: As `eplb_jax.update_history`.
        """
        history = update_history(state.history, load, self.steps_per_window)
        complete = (history.steps == 0).astype(jnp.int32)
        return state._replace(history=history, age=state.age + complete)

    def propose(
        self,
        state: BalancerState,
        *,
        active: ArrayLike | Array | None = None,
        speed: ArrayLike | Array | None = None,
    ) -> Proposal:
        """The next plan, and what it is worth. For `jax.jit`, too; other values compile nothing.

        Args:
            state: What was seen, and the plan in place.
            active: Whether every GPU is alive, [G]; for balancers with elastic=True. None: all.
            speed: Tokens per second of every GPU, [G], relative to the others. None: equal.

        Raises:
            ValueError: Live GPUs have too few slots, or as `eplb_jax.plan`.
        """
        if self.elastic and active is None:
            active = np.ones(self.topology.num_gpus, bool)
        elif active is not None and not self.elastic:
            raise ValueError("active needs a balancer with elastic=True")
        new = plan(
            state.history,
            self.topology,
            policy=self.policy,
            strategy=self.strategy,
            previous=state.plan.phy2log if self.elastic else state.plan,
            active=active,
            speed=speed,
            tolerance=self.tolerance,
            max_moves=self.max_moves,
            move_penalty=self.move_penalty,
            cost=self.cost,
            check=False,
        )
        live = None if active is None else jnp.asarray(active).astype(bool)
        return assess(
            state.history,
            state.plan,
            new,
            live,
            as_speed(speed, self.topology),
            topology=self.topology,
            cost=self.cost,
        )

    def commit(
        self,
        state: BalancerState,
        proposal: Proposal,
        layers: Bool[Array, " L"] | Bool[np.ndarray, " L"] | None = None,
    ) -> BalancerState:
        """The state with a proposal in place.

        Args:
            state: As it was, or with more windows.
            proposal: The plan that was moved to.
            layers: Which layers were moved; None: all.
        """
        if layers is None:
            new = proposal.plan
        else:
            chosen = jnp.asarray(layers)
            new = jax.tree.map(
                lambda x, y: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y),
                proposal.plan,
                state.plan,
            )
        return state._replace(plan=new, age=jnp.zeros((), jnp.int32))


def balancer(
    topology: Topology,
    *,
    policy: Policy = "auto",
    strategy: str | Strategy = "auto",
    tolerance: float = TOLERANCE,
    max_moves: int | None = None,
    move_penalty: float | None = None,
    steps_per_window: int = 1,
    elastic: bool = False,
    cost: Cost | None = None,
) -> Balancer:
    """A balancer for a running service: `init`, `observe`, `propose` and `commit`.

    Args:
        topology: GPUs, slots, nodes and groups.
        policy: As of `eplb_jax.plan`, and so are all up to move_penalty.
        strategy: A name or a `Strategy`.
        tolerance: How much worse than a new plan the next one may be.
        max_moves: Limit of moves per layer; None: no limit.
        move_penalty: Imbalance that a move must gain.
        steps_per_window: Number of calls of `observe` that are one window.
        elastic: Whether GPUs come and go.
        cost: What tokens and active experts cost, as of `eplb_jax.plan`: proposals are in its time.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The strategy is not known, a number is negative, or a cost is given with
            elastic, max_moves or move_penalty.

    Example:
        >>> service = balancer(Topology(3, slots=2))
        >>> state = service.init(num_layers=1, num_experts=4)
        >>> state = service.observe(state, [[10, 20, 30, 90]])
        >>> proposal = service.propose(state)
        >>> proposal.reasons(), proposal.plan.phy2log.tolist()
        (['better'], [[3, 2, 2, 3, 0, 1]])
        >>> state = service.commit(state, proposal)
        >>> service.propose(state).reasons()
        ['near enough']

    References:
        The form is that of optax (github.com/google-deepmind/optax).
    """
    check_topology(topology)
    if max_moves is not None:
        as_limit("max_moves", max_moves)
    tolerance = as_amount("tolerance", tolerance)
    penalty = None if move_penalty is None else as_amount("move_penalty", move_penalty)
    steps = as_count("steps_per_window", steps_per_window)
    chosen = resolve_strategy(strategy)
    if cost is not None and (elastic or max_moves is not None or move_penalty is not None):
        raise ValueError("cost takes no elastic, max_moves or move_penalty; nearest: without these")
    return Balancer(topology, policy, chosen, tolerance, max_moves, penalty, steps, elastic, cost)


def save_balancer(path: str | Path, state: BalancerState) -> None:
    """Write the state of a balancer to one .npz file, completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    save_tree(path, state)


def load_balancer(path: str | Path) -> BalancerState:
    """A state that `save_balancer` wrote, bit for bit.

    For another topology, give its plan and history to `Balancer.init`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no such state, or of another version of the format.
    """
    empty = init_history(0, 1, recent=RECENT, remembered=REMEMBERED)
    plan = Placement(*(jnp.zeros((0, 1, 1)[:k], jnp.int32) for k in (2, 3, 2)))
    like = BalancerState(empty, plan, jnp.zeros((), jnp.int32))
    return load_tree(path, like, "state of a balancer", "save_balancer")
