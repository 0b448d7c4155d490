"""How to search for a packing: `Search`, and the named searches.

A new search is composed from the orders, constructions and refinements of this package, or made
from a named one by `dataclasses.replace`; the engine in `search` takes any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eplb_jax.packing.constructions import (
    Construction,
    chunked_greedy,
    greedy,
    quantised_greedy,
)
from eplb_jax.packing.differencing import BestStart
from eplb_jax.packing.objectives import Objective, peak, spread
from eplb_jax.packing.orders import Lpt, NoisyLpt, Order, RampedLpt, Shuffle, Zigzag
from eplb_jax.packing.portfolio import Portfolio
from eplb_jax.packing.rebuild import Rebuild
from eplb_jax.packing.refinement import Refinement
from eplb_jax.packing.swaps import Swap


@dataclass(frozen=True)
class Search:
    """How to search for a packing.

    Attributes:
        orders: The candidates: families of orders in which items are placed.
        construction: From an order to a packing.
        keep: How many candidates are refined, the best by `objective`.
        refinement: What is done to the candidates that were kept; None: nothing.
        objective: By what candidates are compared, before and after the refinement.
        distinct: Whether items that share a label are kept in distinct packs. False is the parity
            mode: DeepSeek's packing, from float32 weights in their own unit.
    """

    orders: tuple[Order, ...] = (Lpt(),)
    construction: Construction = quantised_greedy
    keep: int = 1
    refinement: Refinement | None = None
    objective: Objective = spread
    distinct: bool = True

    def __post_init__(self) -> None:
        """Reject what no search can run with."""
        if not isinstance(self.orders, tuple):
            raise TypeError(f"orders must be a tuple, got {self.orders!r}")
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


SEARCHES: Mapping[str, Search] = MappingProxyType(
    {
        "auto": Search(construction=BestStart(), refinement=Portfolio(64, 8, 8)),
        "fast": Search(construction=BestStart(), refinement=Portfolio(16, 4, 8)),
        "best": Search(
            orders=(Lpt(), RampedLpt(7, 0.0, 0.1)),
            construction=BestStart(),
            keep=8,
            refinement=Portfolio(256, 64, 32),
            objective=peak,
        ),
        "greedy": Search(construction=greedy, distinct=False),
        "greedy_swap": Search(construction=greedy, refinement=Swap(20, light=None)),
        "ensemble_greedy": Search(
            orders=(Lpt(), Zigzag(), NoisyLpt(63, 0.95, 1.05), NoisyLpt(63, 0.8, 1.2)),
            construction=chunked_greedy,
        ),
        "restarts": Search(
            orders=(Lpt(), RampedLpt(7, 0.01, 0.15)),
            keep=8,
            refinement=Swap(20, heavy=4, light=4),
        ),
        "lns": Search(
            orders=(Lpt(), NoisyLpt(4, 0.9, 1.1)),
            refinement=Rebuild(50, attempts=15, low=0.8, high=1.2, third=True),
            objective=peak,
        ),
        "reconstruct": Search(
            orders=(Lpt(), Zigzag(), Shuffle(32), NoisyLpt(94, 0.9, 1.1)),
            construction=chunked_greedy,
            refinement=Rebuild(5),
        ),
        "ensemble": Search(
            orders=(Lpt(), Zigzag(), NoisyLpt(63, 0.8, 1.2), Shuffle(63)),
            construction=chunked_greedy,
            keep=128,
            refinement=Swap(20),
        ),
        "two_swap": Search(
            orders=(RampedLpt(256, 0.0, 0.2),), keep=8, refinement=Swap(50, pairs=True)
        ),
        "pruned": Search(
            orders=(RampedLpt(2048, 0.0, 0.2),), keep=64, refinement=Swap(50, heavy=4, light=4)
        ),
    }
)
"""The named searches; `eplb_jax.STRATEGIES` adds to them how plans choose replica counts.

`auto` starts from the better of two packings and takes as many steps as reach 1e-4 of the proven
bound; `fast` takes half of them or fewer; `best`, for plans made offline, takes many more from
eight starts. What the steps are depends on the shape alone: see `portfolio.Portfolio`.
"""


def resolve_search(strategy: str | Search) -> Search:
    """The search of that name, or the one given."""
    if isinstance(strategy, Search):
        return strategy
    if strategy not in SEARCHES:
        names = ", ".join(SEARCHES)
        raise ValueError(f"strategy={strategy!r} is not known; choose one of: {names}")
    return SEARCHES[strategy]
