"""Searches in single kernels, for GPUs.

XLA makes several kernels of every step of a search, and a GPU takes longer to launch them than to
run them. Here all exchanges of a layer are one kernel and its greedy start is another, by Pallas
and Triton, behind the interfaces of the plain forms and with their packings, bit for bit. Those
stay the default: this has been lowered for CUDA and run by an interpreter, not yet on a GPU.
"""

import dataclasses

from eplb_jax.packing.kernels.exchanges import InKernel as InKernel
from eplb_jax.packing.kernels.greedy import GreedyInKernel as GreedyInKernel
from eplb_jax.packing.pairs import Pairs
from eplb_jax.packing.portfolio import Peak, Portfolio
from eplb_jax.packing.starts import BestStart
from eplb_jax.packing.strategy import Strategy, resolve


def in_kernels(strategy: str | Strategy, *, interpret: bool = False) -> Strategy:
    """The same search in kernels for CUDA: "auto", "fast", "best" or what is made from them.

    Packs of three to five items take steps that stay with XLA before those in the kernel.

    Args:
        strategy: A name or a `Strategy` whose refinement is a `Portfolio`.
        interpret: Run the kernels by an interpreter, on any platform: for tests.

    Raises:
        ValueError: The strategy is not known, or its refinement is not a `Portfolio`.
    """
    plain = resolve(strategy)
    if not isinstance(plain.refinement, Portfolio):
        raise ValueError(
            f"strategy={strategy!r} has no form in kernels; choose one of: auto, fast, best"
        )
    kernel = InKernel(Pairs(0), Peak(0), interpret)  # `Portfolio` sets the steps
    refinement = dataclasses.replace(plain.refinement, kernel=kernel)
    construction = plain.construction
    if isinstance(construction, BestStart):
        construction = BestStart(GreedyInKernel(interpret=interpret))
    return dataclasses.replace(plain, construction=construction, refinement=refinement)
