"""The cost of a replica on this machine: the time of grouped matrix products against tokens.

    python benchmarks/expert_cost.py --hidden 1024 --intermediate 512 --experts 16 --dtype bfloat16

An expert is two products, of [tokens, hidden] with [hidden, intermediate] and back. Some experts
have equally many tokens, others none; which ones changes from call to call, so that their weights
are read. The last line is the fitted `eplb_jax.Cost`, to paste.
"""

import argparse
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from eplb_jax import CostFit, fit_cost

TOKENS = (1, 4, 16, 24, 32, 48, 64, 96, 112, 128, 144, 192, 256)
"""Tokens of an active expert. Between multiples of a tile time does not grow."""
TILES = (1, 8, 16, 32, 64, 128)
CLEARLY = 0.8
"""A tile is taken where it leaves less than this part of the residual of another."""

Call = Callable[[int], None]
"""A product whose active experts start at that one; it returns when it is done."""


def jax_call(sizes: np.ndarray, hidden: int, intermediate: int, dtype: str) -> Call:
    """`jax.lax.ragged_dot` over all experts."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def product(x: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(jax.lax.ragged_dot(x, up, sizes), down, sizes)

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (int(sizes.sum()), hidden), (len(sizes), hidden, intermediate)
    shapes += ((len(sizes), intermediate, hidden),)
    arrays = [jax.random.normal(k, x, dtype) for k, x in zip(keys, shapes, strict=True)]
    rolled = [jnp.asarray(np.roll(sizes, i), jnp.int32) for i in range(len(sizes))]
    return lambda i: jax.block_until_ready(product(*arrays, rolled[i % len(sizes)]))


def torch_call(sizes: np.ndarray, hidden: int, intermediate: int, dtype: str) -> Call:
    """A loop over the active experts, in one thread of a CPU."""
    import torch

    torch.set_num_threads(1)  # more of them wait for each other where cores are busy
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": getattr(torch, dtype), "device": device}
    up = torch.randn(len(sizes), hidden, intermediate, **options)
    down = torch.randn(len(sizes), intermediate, hidden, **options)
    x = torch.randn(int(sizes.max()), hidden, **options)

    def call(i: int) -> None:
        for expert in np.flatnonzero(np.roll(sizes, i)):
            _ = (x @ up[expert]) @ down[expert]
        if device == "cuda":
            torch.cuda.synchronize()

    return call


CALLS = {"jax": jax_call, "torch": torch_call}


def median_time(call: Call, budget: float, most: int) -> float:
    """The median of many calls, in seconds; the first two compile and warm up."""
    call(0)
    call(1)
    seconds, end = [], perf_counter() + budget
    while len(seconds) < 5 or (perf_counter() < end and len(seconds) < most):
        start = perf_counter()
        call(len(seconds))
        seconds.append(perf_counter() - start)
    return float(np.median(seconds))


def fit(load: np.ndarray, seconds: np.ndarray, tiles: Sequence[int]) -> tuple[CostFit, bool]:
    """The fit with the tile that leaves the least residual, and whether the others leave more.

    One GPU holds all experts, and every measurement is a window of one step.
    """
    placement = np.arange(load.shape[2])[None]
    fits = [fit_cost(load, placement, 1, seconds, tile=x) for x in tiles]
    best = min(fits, key=lambda x: x.residual)
    clear = len(fits) == 1 or best.residual < CLEARLY * fits[0].residual
    return (best if clear else fits[0]), clear


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", choices=CALLS, default="jax")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--tile", type=int, help="default: the one that the curve shows")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds of a measurement")
    given = parser.parse_args(arguments)
    active = sorted({max(given.experts // x, 1) for x in (4, 2, 1)})
    shape = given.hidden, given.intermediate, given.dtype
    load, seconds = [], []
    print(f"| tokens of an expert | {' | '.join(f'{x} active, us' for x in active)} |")
    print(f"|---|{'---|' * len(active)}")
    for tokens in given.tokens:
        row = []
        for count in active:
            sizes = np.where(np.arange(given.experts) < count, tokens, 0)
            row.append(median_time(CALLS[given.backend](sizes, *shape), given.budget, 200))
            load.append(sizes[None])
        seconds += row
        print(f"| {tokens} | {' | '.join(f'{1e6 * x:.1f}' for x in row)} |", flush=True)
    report(np.array(load), np.array(seconds), TILES if given.tile is None else (given.tile,))


def report(load: np.ndarray, seconds: np.ndarray, tiles: Sequence[int]) -> None:
    """Print the fit, its errors and the cost."""
    found, clear = fit(load, seconds, tiles)
    for name, value, error in zip(found.value._fields, found.value, found.error, strict=True):
        if np.isfinite(error):
            print(f"{name}: {value:.3g}, standard error {error:.2g}")
    print(f"residual: {found.residual:.1%}")
    if len(tiles) > 1:
        steps = f"steps of {found.tile} tokens" if clear and found.tile > 1 else "no steps"
        print(f"tile: the curve shows {steps}; --tile sets it")
    if found.cost is None:
        print("no cost: time does not follow tokens here; use more tokens or larger products")
    else:
        print(f"eplb_jax.{found.cost}")


if __name__ == "__main__":
    main()
