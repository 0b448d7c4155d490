"""What to choose for a trace: spares, how often to plan, from what, and for which split.

Every choice is measured by replays on windows that plans were not made from. Options differ little
and windows are few, so of those that are not worse than the best by more than a standard error of
their difference the cheapest is taken: with the fewest slots, or the fewest moves.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.evaluation.replay import (
    Planner,
    Replay,
    plan_from_history,
    plan_from_windows,
    replay,
    without_balancer,
)
from eplb_jax.planning.cost import Cost
from eplb_jax.types import Topology, check_experts, check_topology

NEVER = 1 << 30
"""Windows that a plan stays in place if there is only one."""


class Choice(NamedTuple):
    """An option of a question.

    Attributes:
        name: What it is.
        time: Time of the slowest GPUs in units of that without a balancer, summed over layers and
            held-out windows.
        error: Standard error over windows of the difference to the best option; 0 for the best.
        moves: Slots of a layer that receive an expert from another GPU, mean over windows.
    """

    name: str
    time: float
    error: float
    moves: float


class Answer(NamedTuple):
    """A question, its options, and the index of the one to choose."""

    question: str
    choices: tuple[Choice, ...]
    chosen: int


class Advice(NamedTuple):
    """What to choose, question by question; each takes the answers before it.

    Attributes:
        answers: For slots of a GPU, split, past windows, and windows from plan to plan.
        windows: Number of held-out windows.
        time: Time of the slowest GPUs with these choices, in units of that without a balancer.
        error: Standard error of that over windows.
        rebalance: Whether that is less than without a balancer by more than two standard errors.
    """

    answers: tuple[Answer, ...]
    windows: int
    time: float
    error: float
    rebalance: bool


def advise(
    trace: LoadLike,
    topology: Topology,
    *,
    slots: Sequence[int] | None = None,
    window: int | None = None,
    cost: Cost | None = None,
    on_replay: Callable[[str], object] | None = None,
) -> Advice:
    """What to choose for a service with this traffic, from replays of its trace.

    Runs on the host; each number of slots, split and kind of past compiles plans, some seconds
    each. Windows follow each other, so standard errors are those of independent ones at best.

    Args:
        trace: Loads in any unit, [T, L, E], oldest window first.
        topology: GPUs, nodes and groups; its slots are the most to consider.
        slots: Slots of a GPU to try, ascending; None: from none to spare up to the topology's.
        window: Windows before the first that is measured; None: a quarter, at most 8.
        cost: What tokens and active experts cost. None: time is tokens, and a flexible split is
            considered, too.
        on_replay: Called with the name of every option before it is measured.

    Returns:
        The answers, each with all that was measured for it.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The trace has fewer than 4 windows, or as `replay`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> trace = rng.poisson([900, 500, *[100] * 6], (12, 2, 8))  # of 2 layers, 8 experts
        >>> advice = advise(trace, Topology(2, slots=5), slots=[5])
        >>> advice.rebalance, advice.time < 0.7
        (True, True)

    References:
        The rule of one standard error: L. Breiman et al., Classification and Regression Trees,
        1984.
    """
    check_topology(topology)
    loads = np.asarray(as_load(trace, "trace", least_axes=3), np.float64)
    if len(loads) < 4:
        raise ValueError(f"trace has {len(loads)} windows; advice needs at least 4")
    check_experts(topology, loads.shape[2])
    least = -(-loads.shape[2] // topology.num_gpus)
    sizes = range(least, topology.slots_per_gpu + 1) if slots is None else slots
    sizes = sorted({as_count("slots", x, least=least) for x in sizes})
    window = max(1, min(8, len(loads) // 4)) if window is None else as_count("window", window)
    base = without_balancer(loads, topology, window=window, cost=cost)
    study = _Study(loads, window, cost, base.slowest.sum(axis=1), on_replay or (lambda name: None))

    def planner(topology: Topology, **options: Any) -> Planner:
        return plan_from_history(topology, cost=cost, **options)

    def ask(
        question: str, options: Sequence["_Option"], *, fewest_moves: bool = False
    ) -> "_Option":
        results = [study.measure(x) for x in options]
        answers.append(_answer(question, options, results, study.base, fewest_moves))
        return options[answers[-1].chosen]

    answers: list[Answer] = []
    shapes = [replace(topology, slots=x) for x in sizes]
    names = [f"{x.slots} ({x.num_replicas - loads.shape[2]} spare in a layer)" for x in shapes]
    options = [_Option(n, x, planner(x)) for n, x in zip(names, shapes, strict=True)]
    best = ask("slots of a GPU", options)
    if cost is None:
        made = planner(best.topology, split="flexible")
        best = ask(
            "split", [best.named("equal"), _Option("flexible", best.topology, made, "flexible")]
        )
    ways = {"cost": cost, "split": best.split}
    last = plan_from_windows(best.topology, **ways)
    some = _Option("the last", best.topology, lambda past, old: last(past[-1:], old), best.split)
    recent = partial(plan_from_history, best.topology, remembered=0, **ways)
    best = ask(
        "past windows",
        [
            some,
            _Option("the last 8", best.topology, recent(), best.split),
            best.named("the last 8 and groups of older ones"),
        ],
        fewest_moves=True,
    )
    periods = [x for x in (8, 4, 2, 1) if x <= max(1, (len(loads) - window) // 2)]
    best = ask(
        "windows from plan to plan",
        [best.named("only one plan", NEVER), *(best.named(str(x), x) for x in periods)],
        fewest_moves=True,
    )
    times = study.measure(best).slowest.sum(axis=1)
    saved = times - study.base
    scale = study.base.mean()
    error = _standard_error(saved) / scale
    time = float(times.mean() / scale)
    return Advice(tuple(answers), len(times), time, error, bool(time + 2 * error < 1))


class _Option(NamedTuple):
    """What is replayed under a name."""

    name: str
    topology: Topology
    planner: Planner
    split: Any = None
    every: int = 1

    def named(self, name: str, every: int | None = None) -> "_Option":
        return self._replace(name=name, every=self.every if every is None else every)


class _Study(NamedTuple):
    """A trace, what was measured without a balancer, and how to measure options."""

    loads: Float[np.ndarray, "T L E"]
    window: int
    cost: Cost | None
    base: Float[np.ndarray, " W"]
    on_replay: Callable[[str], object]

    def measure(self, option: _Option) -> Replay:
        """The option's replay."""
        self.on_replay(option.name)
        every = min(option.every, len(self.loads))
        return replay(
            self.loads,
            option.planner,
            option.topology,
            window=self.window,
            every=every,
            all_past=True,
            split=option.split,
            cost=self.cost,
        )


def _answer(
    question: str,
    options: Sequence[_Option],
    results: list[Replay],
    base: np.ndarray,
    fewest_moves: bool,
) -> Answer:
    times = np.stack([x.slowest.sum(axis=1) for x in results])  # [options, windows]
    best, scale = int(times.mean(axis=1).argmin()), max(base.mean(), 1e-30)
    errors = [_standard_error(x - times[best]) / scale for x in times]
    mean = times.mean(axis=1) / scale
    moves = [x.moves.sum() / x.moves.shape[1] / len(base) if x.moves.size else 0 for x in results]
    good = [i for i, x in enumerate(mean) if x <= mean[best] + errors[i]]
    chosen = min(good, key=lambda i: moves[i]) if fewest_moves else good[0]
    named = zip(options, mean, errors, moves, strict=True)
    choices = tuple(Choice(x.name, float(t), e, float(m)) for x, t, e, m in named)
    return Answer(question, choices, chosen)


def _standard_error(x: Float[np.ndarray, " W"]) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("inf")
