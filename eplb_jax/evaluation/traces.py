"""Synthetic traces: loads whose skew and change over windows are chosen.

For tests, and for comparisons that need a skew or a change that no measured trace has.
"""

from collections.abc import Callable
from math import prod
from typing import Literal, NamedTuple, SupportsFloat, SupportsIndex, get_args

import numpy as np
from jaxtyping import Float, Int64

from eplb_jax.checks import as_count, as_number, check_divides
from eplb_jax.files import check_memory

Kind = Literal["stationary", "drift", "topics", "bursts"]

_CHANGE = {"drift": 0.1, "topics": 0.1, "bursts": 0.2}  # default of `change`
_ARRAYS = 4  # as large as the trace, that are held at a time
_MAX_SKEW = 64  # far beyond it each expert's load is negligible beside the next larger one
_MIN_LOG = -600.0  # minimum log popularity relative to the largest, so that no share is zero

# Bursts: maximum number of experts and of windows, and the range of the factor of the load.
_BURST_EXPERTS, _BURST_WINDOWS, _BURST_LOAD = 3, 4, (3, 8)

# The search for a skew: skews tried in turn until one is too large; relative width of the bracket
# at which bisection stops; multiples of the result tried next, as with few tokens the balancedness
# is not monotone; the error at which the search stops, and the largest accepted.
_SKEWS = (0.0, *np.geomspace(0.5, _MAX_SKEW, 13).tolist())
_SKEW_STEP = 0.001
_NEARBY = np.linspace(0.7, 1.4, 141).tolist()
_CLOSE, _TOLERANCE = 0.001, 0.01


class _Process(NamedTuple):
    """Popularities: a mixture over topics, and a shift of their logarithms."""

    log_popularity: Float[np.ndarray, "topics L E"]
    mixture: Float[np.ndarray, "T topics"]
    shift: Float[np.ndarray, "#T #L #E"]


def generate(
    kind: Kind,
    num_windows: SupportsIndex,
    num_layers: SupportsIndex,
    num_experts: SupportsIndex,
    *,
    tokens: SupportsIndex = 8192,
    top_k: SupportsIndex = 8,
    skew: SupportsFloat = 1.0,
    balancedness: SupportsFloat | None = None,
    num_gpus: SupportsIndex | None = None,
    change: SupportsFloat | None = None,
    topics: SupportsIndex = 4,
    seed: SupportsIndex = 0,
) -> Int64[np.ndarray, "T L E"]:
    """The number of tokens routed to every expert in every window.

    The popularities of experts are lognormal and independent. Kinds differ in how they change from
    window to window:

    - stationary: not at all; windows differ by sampling noise.
    - drift: the log popularity of every expert does a random walk of its own.
    - topics: every topic has its own popularities. All layers have the same mixture of topics; in
      every window a fraction of it is replaced by one topic drawn at random.
    - bursts: at random times one to three experts of a layer get 3 to 8 times their load, for one
      to four windows.

    Every layer of every window adds up to `tokens` times `top_k`. No expert gets more than
    `tokens`, as the `top_k` experts of a token are distinct: shares are capped at 1 / `top_k`, and
    the others grow in proportion. Equal arguments give equal traces.

    Args:
        kind: One of the above.
        num_windows: T.
        num_layers: L.
        num_experts: E.
        tokens: Tokens of a window.
        top_k: Experts of a token; at most E.
        skew: Standard deviation of log popularity, 0 to 64; with drift, that of the first window.
            Not used with `balancedness`.
        balancedness: Instead of `skew`: the mean over windows and layers of mean / max GPU load,
            without replicas and with experts in order. The skew is found by bisection, to an error
            of at most 0.01, mostly 0.001.
        num_gpus: G, for `balancedness`: each GPU has E / G experts. None: E.
        change: How much changes in a window. Drift: standard deviation of the step of a log
            popularity, 0 to 64, by default 0.1. Topics: fraction of the mixture that is replaced,
            0 to 1, by default 0.1. Bursts: probability that one starts in a layer, 0 to 1, by
            default 0.2. Stationary: None.
        topics: Number of topics, for that kind.
        seed: Seed of all draws; not negative.

    Returns:
        Counts of routed tokens, oldest window first.

    Raises:
        TypeError: An argument is not a number.
        ValueError: The kind is not known, a number is out of range, or the balancedness cannot be
            reached: sampling noise and change limit it from above, `top_k` from below.
        MemoryError: The trace does not fit in the memory of the machine.

    Example:
        >>> trace = generate("drift", 3, 2, 16, tokens=100, top_k=4, skew=0.5)
        >>> trace.shape
        (3, 2, 16)
        >>> bool(np.all(trace.sum(axis=2) == 400)), bool(trace.max() <= 100)
        (True, True)
    """
    if kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise ValueError(f"kind={kind!r} is not known; choose one of: {known}")
    experts = as_count("num_experts", num_experts)
    shape = as_count("num_windows", num_windows), as_count("num_layers", num_layers), experts
    check_memory(_ARRAYS * 8 * prod(shape))
    top_k, tokens = as_count("top_k", top_k), as_count("tokens", tokens)
    if top_k > experts:
        raise ValueError(f"top_k={top_k} is more than num_experts={experts}; nearest: {experts}")
    if tokens * top_k > 2**53:
        most = 2**53 // top_k
        raise ValueError(f"tokens={tokens} is more than {most}; nearest: {most}")
    num_gpus = experts if num_gpus is None else as_count("num_gpus", num_gpus)
    check_divides("num_gpus", num_gpus, "num_experts", experts)
    skew = _number("skew", skew, 0, _MAX_SKEW)
    topics = as_count("topics", topics)
    change = _change(kind, change)
    draws, sampling = np.random.SeedSequence(as_count("seed", seed, least=0)).spawn(2)
    process = _process(kind, shape, change, topics, np.random.default_rng(draws))

    def trace(skew: float) -> Int64[np.ndarray, "T L E"]:
        share = _share(process, skew, top_k)
        return _sample(share, tokens, top_k, np.random.default_rng(sampling))

    if balancedness is None:
        return trace(skew)
    return _with_balancedness(trace, _number("balancedness", balancedness, 0, 1), num_gpus)


def _number(name: str, value: SupportsFloat, least: float, most: float) -> float:
    number = as_number(name, value)
    if not least <= number <= most:
        nearest = min(most, max(least, number))
        raise ValueError(f"{name}={number} is not from {least} to {most}; nearest: {nearest}")
    return number


def _change(kind: Kind, change: SupportsFloat | None) -> float:
    if kind not in _CHANGE:
        if change is not None:
            raise ValueError(f"change={change} has no meaning for kind={kind!r}; nearest: None")
        return 0.0
    if change is None:
        return _CHANGE[kind]
    return _number("change", change, 0, _MAX_SKEW if kind == "drift" else 1)


def _process(
    kind: Kind, shape: tuple[int, int, int], change: float, topics: int, rng: np.random.Generator
) -> _Process:
    num_windows, num_layers, num_experts = shape
    mixed = topics if kind == "topics" else 1
    log_popularity = rng.standard_normal((mixed, num_layers, num_experts))
    mixture, shift = np.ones((num_windows, 1)), np.zeros((1, 1, 1))
    if kind == "drift":
        shift = change * rng.standard_normal(shape)
        shift[0] = 0
        shift = np.cumsum(shift, axis=0)
    elif kind == "topics":
        mixture = _mixture(num_windows, topics, change, rng)
    elif kind == "bursts":
        shift = _bursts(shape, change, rng)
    return _Process(log_popularity, mixture, shift)


def _mixture(
    num_windows: int, topics: int, change: float, rng: np.random.Generator
) -> Float[np.ndarray, "T topics"]:
    """An autoregressive process whose innovations are single topics."""
    mixture = np.empty((num_windows, topics))
    mixture[0] = rng.dirichlet(np.ones(topics))
    for t in range(1, num_windows):
        mixture[t] = (1 - change) * mixture[t - 1]
        mixture[t, rng.integers(topics)] += change
    return mixture


def _bursts(
    shape: tuple[int, int, int], change: float, rng: np.random.Generator
) -> Float[np.ndarray, "T L E"]:
    """The log of the factors that loads are multiplied by; the larger where bursts overlap."""
    num_windows, num_layers, num_experts = shape
    before = _BURST_WINDOWS - 1  # bursts may have begun before the first window
    factor = np.ones((before + num_windows, num_layers, num_experts))
    for t, layer in np.argwhere(rng.random(factor.shape[:2]) < change):
        hit = min(rng.integers(1, _BURST_EXPERTS, endpoint=True), num_experts)
        experts = rng.choice(num_experts, hit, replace=False)
        times = slice(t, t + rng.integers(1, _BURST_WINDOWS, endpoint=True))
        boosted = np.maximum(factor[times, layer, experts], rng.uniform(*_BURST_LOAD))
        factor[times, layer, experts] = boosted
    return np.log(factor[before:])


def _share(process: _Process, skew: float, top_k: int) -> Float[np.ndarray, "T L E"]:
    log = skew * process.log_popularity + process.shift[:, None]
    return np.sum(process.mixture[:, :, None, None] * _capped_shares(log, top_k), axis=1)


def _capped_shares(log: Float[np.ndarray, "... E"], top_k: int) -> Float[np.ndarray, "... E"]:
    """Shares in proportion to popularity, capped at 1 / top_k."""
    popularity = np.exp(np.maximum(log - log.max(axis=-1, keepdims=True), _MIN_LOG))
    ascending = np.sort(popularity, axis=-1)
    # The sum of the i-th most popular and all less popular experts, smallest first for accuracy.
    rest = np.cumsum(ascending, axis=-1)[..., ::-1]
    place = np.arange(log.shape[-1])
    fits = ascending[..., ::-1] * (top_k - place) <= rest
    full = np.argmax(fits, axis=-1)[..., None]
    scale = (top_k - full) / (top_k * np.take_along_axis(rest, full, axis=-1))
    return np.minimum(popularity * scale, 1 / top_k)


def _sample(
    share: Float[np.ndarray, "T L E"], tokens: int, top_k: int, rng: np.random.Generator
) -> Int64[np.ndarray, "T L E"]:
    """Multinomial counts; the excess of an expert over `tokens` is drawn again."""
    load = rng.multinomial(tokens * top_k, share)
    while True:
        excess = np.maximum(load - tokens, 0).sum(axis=-1)
        over = excess > 0
        if not over.any():
            return load
        load = np.minimum(load, tokens)
        # Every round fills at least one more expert.
        free = np.where(load[over] < tokens, share[over], 0)
        load[over] += rng.multinomial(excess[over], free / free.sum(axis=-1, keepdims=True))


def _with_balancedness(
    trace: Callable[[float], Int64[np.ndarray, "T L E"]], target: float, num_gpus: int
) -> Int64[np.ndarray, "T L E"]:
    """The trace of that balancedness: bisection over the skew, then a scan around the result."""
    reached: dict[float, float] = {}

    def exceeds(skew: float) -> bool:
        reached[skew] = balancedness_of(trace(skew), num_gpus)
        return reached[skew] > target

    def error(skew: float) -> float:
        return abs(reached[skew] - target)

    place = next((i for i, skew in enumerate(_SKEWS) if not exceeds(skew)), 0)
    if place:
        low, high = _SKEWS[place - 1 : place + 1]
        while high - low > _SKEW_STEP * high:
            middle = (low + high) / 2
            low, high = (middle, high) if exceeds(middle) else (low, middle)
        for factor in _NEARBY:
            if min(map(error, reached)) <= _CLOSE:
                break
            exceeds(factor * high)
    nearest = min(reached, key=error)
    if error(nearest) > _TOLERANCE:
        raise ValueError(
            f"balancedness={target} cannot be reached; nearest: {reached[nearest]:.4g}"
        )
    return trace(nearest)


def balancedness_of(load: Int64[np.ndarray, "T L E"], num_gpus: int) -> float:
    """Mean / max GPU load with experts in order, mean over windows and layers.

    In float64 and without JAX, so that traces do not depend on the backend.

    Example:
        >>> balancedness_of(np.array([[[3, 1, 2, 2]]]), 2)
        1.0
    """
    gpu_load = load.reshape(*load.shape[:2], num_gpus, -1).sum(axis=-1)
    return float(np.mean(gpu_load.mean(axis=-1) / gpu_load.max(axis=-1)))
