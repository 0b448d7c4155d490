"""Search strategies: values that say how to pack, and the named ones.

A new strategy is composed from the orders, constructions and refinements of this package, or
made from a named one by `dataclasses.replace`; the engine in `search` takes any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eplb_jax.joint import JointCounts
from eplb_jax.packing.construction import (
    Construction,
    chunked_greedy,
    greedy,
    quantised_greedy,
)
from eplb_jax.packing.objective import Objective, peak, spread
from eplb_jax.packing.orders import Lpt, NoisyLpt, Order, RampedLpt, Shuffle, Zigzag
from eplb_jax.packing.portfolio import Portfolio
from eplb_jax.packing.refinement import Rebuild, Refinement, Swap
from eplb_jax.packing.starts import BestStart


@dataclass(frozen=True)
class Strategy:
    """How to search for a packing.

    Attributes:
        orders: The candidates: families of orders in which items are placed.
        construction: From an order to a packing.
        keep: How many candidates go on to the refinement, the best by `objective`.
        refinement: What is done to the candidates that were kept; None: nothing.
        objective: By what candidates are compared, before and after the refinement.
        distinct: Whether a plan may part from the packing that was found to keep replicas of one
            expert on distinct GPUs, and to spread the spares of layers without load.
        counts: How a plan with few slots a GPU chooses the replicas of every expert; None: as
            `eplb_jax.replicate_experts`, whatever the packing.
    """

    orders: tuple[Order, ...] = (Lpt(),)
    construction: Construction = quantised_greedy
    keep: int = 1
    refinement: Refinement | None = None
    objective: Objective = spread
    distinct: bool = True
    counts: JointCounts | None = None

    def __post_init__(self) -> None:
        """Reject counts that no search can run with."""
        if self.num_candidates < 1:
            raise ValueError("orders must offer at least one candidate, got none")
        if not 1 <= self.keep <= self.num_candidates:
            raise ValueError(
                f"keep={self.keep} must be between 1 and the number of candidates, "
                f"{self.num_candidates}"
            )

    @property
    def num_candidates(self) -> int:
        """How many packings are constructed."""
        return sum(order.count for order in self.orders)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "auto": Strategy(
            construction=BestStart(),
            refinement=Portfolio(64, 8, 8),
            counts=JointCounts(targets=8, moves=12, divisors=3),
        ),
        "fast": Strategy(
            construction=BestStart(),
            refinement=Portfolio(16, 4, 8),
            counts=JointCounts(targets=4, moves=6, divisors=1),
        ),
        "best": Strategy(
            orders=(Lpt(), RampedLpt(7, 0.0, 0.1)),
            construction=BestStart(),
            keep=8,
            refinement=Portfolio(256, 64, 32),
            objective=peak,
            counts=JointCounts(targets=16, moves=24, divisors=5),
        ),
        "greedy": Strategy(construction=greedy, distinct=False),
        "greedy_swap": Strategy(construction=greedy, refinement=Swap(20, light=None)),
        "ensemble_greedy": Strategy(
            orders=(Lpt(), Zigzag(), NoisyLpt(63, 0.95, 1.05), NoisyLpt(63, 0.8, 1.2)),
            construction=chunked_greedy,
        ),
        "restarts": Strategy(
            orders=(Lpt(), RampedLpt(7, 0.01, 0.15)),
            keep=8,
            refinement=Swap(20, heavy=4, light=4),
        ),
        "lns": Strategy(
            orders=(Lpt(), NoisyLpt(4, 0.9, 1.1)),
            refinement=Rebuild(50, attempts=15, low=0.8, high=1.2, third=True),
            objective=peak,
        ),
        "reconstruct": Strategy(
            orders=(Lpt(), Zigzag(), Shuffle(32), NoisyLpt(94, 0.9, 1.1)),
            construction=chunked_greedy,
            refinement=Rebuild(5),
        ),
        "ensemble": Strategy(
            orders=(Lpt(), Zigzag(), NoisyLpt(63, 0.8, 1.2), Shuffle(63)),
            construction=chunked_greedy,
            keep=128,
            refinement=Swap(20),
        ),
        "two_swap": Strategy(
            orders=(RampedLpt(256, 0.0, 0.2),), keep=8, refinement=Swap(50, pairs=True)
        ),
        "pruned": Strategy(
            orders=(RampedLpt(2048, 0.0, 0.2),), keep=64, refinement=Swap(50, heavy=4, light=4)
        ),
    }
)
"""The named strategies.

`auto` starts from the better of two packings and takes as many steps as reach parts in 10^4 of the
proven bound; `fast` takes half of them or fewer; `best`, for plans made offline, takes many more
from eight starts. What the steps are depends on the shape alone: see `portfolio.Portfolio`.
"""


def resolve(strategy: str | Strategy) -> Strategy:
    """The strategy of that name, or the one given."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy not in STRATEGIES:
        names = ", ".join(STRATEGIES)
        raise ValueError(f"strategy={strategy!r} is not known; choose one of: {names}")
    return STRATEGIES[strategy]
