"""Strategies: how a plan searches, for packings and for replica counts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eplb_jax.packing.searches import SEARCHES, Search, resolve_search
from eplb_jax.planning.replica_counts import CountSearch


@dataclass(frozen=True)
class Strategy(Search):
    """How to search for a plan: a `Search` for packings, and one for replica counts.

    Attributes:
        counts: How a plan with few slots a GPU chooses the number of replicas of every expert;
            None: as `eplb_jax.replicate_experts`, whatever the packing.
    """

    counts: CountSearch | None = None


_COUNTS = {
    "auto": CountSearch(targets=8, moves=12, divisors=3),
    "fast": CountSearch(targets=4, moves=6, divisors=1),
    "best": CountSearch(targets=16, moves=24, divisors=5),
}


def _with_counts(search: Search, counts: CountSearch | None) -> Strategy:
    fields = {x.name: getattr(search, x.name) for x in dataclasses.fields(Search)}
    return Strategy(**fields, counts=counts)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {name: _with_counts(search, _COUNTS.get(name)) for name, search in SEARCHES.items()}
)
"""The named strategies, by name."""


def resolve_strategy(strategy: str | Search) -> Strategy:
    """The strategy of that name, or the one given.

    Raises:
        ValueError: No strategy has that name.

    Example:
        >>> resolve_strategy("greedy").distinct
        False
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, Search):
        return _with_counts(strategy, None)
    resolve_search(strategy)
    return STRATEGIES[strategy]


def in_kernels(strategy: str | Strategy, *, interpret: bool = False) -> Strategy:
    """The same strategy with its exchanges in Pallas kernels for CUDA, and the same plans.

    Packs of three to five items take steps that stay with XLA before those in the kernel. The
    kernels have been lowered for CUDA and run by an interpreter; they have not run on a GPU yet.

    Args:
        strategy: "auto", "fast", "best", or a `Strategy` made from one of them.
        interpret: Run the kernels by Pallas's interpreter, on any platform: for tests.

    Raises:
        ValueError: The strategy is not known, or its refinement is not a `Portfolio`.

    Example:
        >>> in_kernels("auto").keep
        1
    """
    from eplb_jax.packing.kernels import search_in_kernels  # Pallas is imported where it is used

    plain = resolve_strategy(strategy)
    return _with_counts(search_in_kernels(plain, interpret=interpret), plain.counts)
