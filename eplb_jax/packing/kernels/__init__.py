"""Searches in single kernels, for GPUs.

XLA makes several kernels of every step of a search, and a GPU takes longer to launch them than to
run them. Here all exchanges of a layer are one kernel and its greedy start is another, by Pallas
and Triton, behind the interfaces of the plain forms and with their packings, bit for bit. Those
stay the default: this has been lowered for CUDA and run by an interpreter, not yet on a GPU.
"""

import dataclasses

from eplb_jax.packing.differencing import BestStart
from eplb_jax.packing.kernels.exchanges import InKernel as InKernel
from eplb_jax.packing.kernels.exchanges import PortfolioInKernel as PortfolioInKernel
from eplb_jax.packing.kernels.greedy import GreedyInKernel as GreedyInKernel
from eplb_jax.packing.portfolio import Portfolio
from eplb_jax.packing.searches import Search


def search_in_kernels(plain: Search, *, interpret: bool) -> Search:
    """The same search in kernels for CUDA; `interpret` runs them by an interpreter, for tests.

    Raises:
        ValueError: Its refinement is not a `Portfolio`.
    """
    portfolio, construction = plain.refinement, plain.construction
    if not isinstance(portfolio, Portfolio):
        raise ValueError("the strategy has no form in kernels; choose one of: auto, fast, best")
    steps = portfolio.columns, portfolio.rounds, portfolio.peaks
    if isinstance(construction, BestStart):
        construction = BestStart(GreedyInKernel(interpret=interpret))
    refinement = PortfolioInKernel(*steps, interpret=interpret)
    return dataclasses.replace(plain, construction=construction, refinement=refinement)
