"""What was seen of the traffic, in bounded space: the last windows, and groups of older ones.

Mixed traffic comes back: a plan that fits windows of an hour ago fits the next one like them. So
older windows are not dropped: the two most alike are merged, with their weights, whenever there are
more than fit. Beside the windows are kept the means that could predict the next one, and scores of
how well each would have done so far, by which `forecast` weighs them.

Layers are independent: the history of a layer is the same, bit for bit, in every batch and
sharding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from eplb_jax.arrays import ordered_sum
from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.planning.scores import KEPT, Scores, score
from eplb_jax.planning.windows import (
    Groups,
    Windows,
    finite,
    merge_two,
    weighted_mean,
    windows_of,
)
from eplb_jax.sharding import spec_of, under_auto

RECENT = 8
"""Windows that are kept as they are."""

REMEMBERED = 8
"""Groups of older windows."""

GAINS = (64, 45, 32, 19, 10)
"""Gains of the exponentially weighted means, in 64ths."""


class History(NamedTuple):
    """What was seen of the traffic: a pytree of fixed size, a part of the state of a service.

    Attributes:
        recent: Tokens of the last H windows with load of every layer, oldest first; zeros where
            there are none yet.
        remembered: Mean shares of K groups of older windows, in units of `TOTAL`.
        tokens: Tokens of every group.
        windows: Number of windows of every group, older ones counting less; 0: no group.
        means: Exponentially weighted means of all windows, in units of `TOTAL`, one for each gain.
        scores: How well each of these would have foretold the windows after it.
        current: The sum over the current window.
        rest: The rounding error of current.
        steps: Number of steps in the current window.
    """

    recent: Float[Array, "H L E"]
    remembered: Int32[Array, "K L E"]
    tokens: Float[Array, "K L"]
    windows: Float[Array, "K L"]
    means: Int32[Array, "gains L E"]
    scores: Scores
    current: Float[Array, "L E"]
    rest: Float[Array, "L E"]
    steps: Int32[Array, ""]

    def groups(self) -> Groups:
        """The groups of older windows."""
        return Groups(self.remembered, self.tokens, self.windows)

    def where(self, chosen: Bool[Array, " L"], other: "History") -> "History":
        """The layers that are chosen, with those of another history in place of the rest."""

        def choose(name: str) -> Any:
            last = (1,) if name in ("recent", "remembered", "means", "current", "rest") else ()

            def of_leaf(x: Array, y: Array) -> Array:
                shape = chosen.shape + last
                return jnp.where(chosen.reshape((1,) * (x.ndim - len(shape)) + shape), x, y)

            return jax.tree.map(of_leaf, getattr(self, name), getattr(other, name))

        return self._replace(**{name: choose(name) for name in self._fields if name != "steps"})


def init_history(
    num_layers: int, num_experts: int, *, recent: int = RECENT, remembered: int = REMEMBERED
) -> History:
    """A history of nothing.

    Args:
        num_layers: L.
        num_experts: E.
        recent: H, windows that are kept as they are.
        remembered: K, groups of older windows; 0 forgets them.

    Raises:
        TypeError: A number is not an integer.
        ValueError: A number is less than 1, or `remembered` less than 0.

    Example:
        >>> init_history(58, 256).recent.shape
        (8, 58, 256)
    """
    recent, remembered = as_count("recent", recent), as_count("remembered", remembered, least=0)
    shape = as_count("num_layers", num_layers, least=0), as_count("num_experts", num_experts)
    return empty_history(recent, remembered, *shape)


def empty_history(recent: int, remembered: int, num_layers: int, num_experts: int) -> History:
    """`init_history` of checked numbers."""
    shape, gains = (num_layers, num_experts), len(GAINS)

    def zeros(*count: int) -> Float[Array, "..."]:
        return jnp.zeros((*count, num_layers), jnp.float32)

    # Distinct arrays, so that a caller can donate all of them.
    return History(
        jnp.zeros((recent, *shape), jnp.float32),
        jnp.zeros((remembered, *shape), jnp.int32),
        zeros(remembered),
        zeros(remembered),
        jnp.zeros((gains, *shape), jnp.int32),
        Scores(zeros(), zeros(), zeros(gains), zeros(gains), zeros(), zeros(), zeros()),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((), jnp.int32),
    )


def update_history(history: History, load: LoadLike, steps_per_window: int = 1) -> History:
    """The history after one more step; pure, and meant for `jax.jit`, also inside a model.

    Sums over the steps of a window neither overflow nor stop growing: they are float32 with the
    rounding error kept beside them, correct to 2^-24 for any number of steps. A layer without load
    in a window keeps its history. O(K^2 E) a layer when a window is complete.

    Args:
        history: What was seen so far.
        load: [L, E] tokens of every expert in this step; anything `jnp.asarray` takes. In an array
            of JAX, which is not read to be checked, NaN and negative loads count as zero and
            infinite ones as the largest float32.
        steps_per_window: Number of steps of a window.

    Raises:
        ValueError: The load has another shape, or holds what is NaN, infinite or negative;
            steps_per_window is less than 1.

    Example:
        >>> history = init_history(1, 3, recent=2)
        >>> for step in range(4):
        ...     history = update_history(history, jnp.array([[step, 1, 0]]), steps_per_window=2)
        >>> history.recent.tolist()
        [[[1.0, 2.0, 0.0]], [[5.0, 2.0, 0.0]]]
    """
    steps_per_window = as_count("steps_per_window", steps_per_window)
    checked = not isinstance(load, jax.Array)  # whose device is not waited for
    load = as_load(load, "load", ("layer", "expert"), least_axes=2, check=checked)
    if load.shape != history.current.shape:
        raise ValueError(f"load has the shape {load.shape}, the history's {history.current.shape}")
    update = partial(_update, steps_per_window=steps_per_window)
    return under_auto(update, jax.tree.map(spec_of, history), history, load)


@partial(jax.jit, static_argnames="steps_per_window")
def _update(past: History, load: Float[Array, "L E"], *, steps_per_window: int) -> History:
    addend = finite(load) + past.rest
    total = past.current + addend
    # Knuth's two-sum: the rounding error of `total`.
    gained = total - past.current
    rest = (past.current - (total - gained)) + (addend - gained)
    if steps_per_window == 1:
        zero = jnp.zeros_like(total)
        return add_window(past, total)._replace(current=zero, rest=zero)
    steps = past.steps + 1

    def complete(past: History) -> History:
        zero = jnp.zeros_like(total)
        return add_window(past, total)._replace(current=zero, rest=zero, steps=steps * 0)

    def go_on(past: History) -> History:
        return past._replace(current=total, rest=rest, steps=steps)

    return lax.cond(steps >= steps_per_window, complete, go_on, past)


def merge_histories(histories: Sequence[History]) -> History:
    """What several replicas of a service saw of one traffic in the same windows, as one history.

    Recent windows are added up, those of one age with each other; of the groups of all, the most
    alike are merged until K are left. Means, scores and numbers of windows are averaged.

    Args:
        histories: At least one, all of the same shapes.

    Raises:
        ValueError: There are none, or their shapes differ.

    Example:
        >>> empty = init_history(1, 2, recent=1)
        >>> both = [update_history(empty, jnp.array([x])) for x in ([3, 1], [0, 4])]
        >>> merge_histories(both).recent.tolist()
        [[[3.0, 5.0]]]
    """
    if not histories:
        raise ValueError("histories must hold at least one History, got none")
    shapes = [jax.tree.map(jnp.shape, x) for x in histories]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"histories must have one shape, got {shapes[0].recent} and {shapes[0].remembered} "
                f"but {shape.recent} and {shape.remembered} in histories[{i}]"
            )
    specs = jax.tree.map(spec_of, histories[0])
    return under_auto(lambda *x: _merge(x), specs, *histories)


@jax.jit
def _merge(histories: tuple[History, ...]) -> History:
    count = len(histories)

    def mean(*x: Array) -> Array:
        return ordered_sum(jnp.stack(x), 0) / count

    first = histories[0]
    recent, current, rest = (
        ordered_sum(jnp.stack([getattr(x, name) for x in histories]), 0)
        for name in ("recent", "current", "rest")
    )
    windows = windows_of(recent)
    groups = first.groups()._replace(windows=first.windows / count)
    if len(first.remembered) and count > 1:
        others = [x.groups()._replace(windows=x.windows / count) for x in histories[1:]]
        others = jax.tree.map(lambda *x: jnp.concatenate(x), *others)
        groups, _ = lax.scan(lambda x, y: (merge_two(x, y, windows), None), groups, others)
    share = jnp.stack([x.means for x in histories])
    seen = jnp.stack([x.scores.seen for x in histories])
    weight = jnp.broadcast_to(seen[:, None], share.shape[:-1])
    return History(
        recent,
        *groups,
        jax.vmap(weighted_mean, 1)(share, weight),
        jax.tree.map(mean, *(x.scores for x in histories)),
        current,
        rest,
        first.steps,
    )


def add_window(past: History, load: Float[Array, "L E"], *, by_size: bool = False) -> History:
    """The history after one more window of `finite` loads; a layer without load keeps its own."""
    windows = windows_of(jnp.concatenate([past.recent, load[None]]), by_size=by_size)
    new, present = windows.share[-1], windows.tokens[-1] > 0
    first = past.scores.seen == 0
    # A window that says little hardly changes the means.
    gain = jnp.asarray(GAINS, jnp.float32)[:, None] * windows.evidence[-1:]
    change = ((new[None] - past.means) >> 6) * (gain + 0.5).astype(jnp.int32)[..., None]
    # The shift rounds down, so a mean near 0 would fall below it.
    moved = jnp.maximum(past.means + change, 0)
    means = jnp.where(first[None, :, None], new[None], moved)
    groups = _remember(past, windows)
    recent = jnp.concatenate([past.recent[1:], load[None]])
    after = past._replace(
        recent=recent,
        remembered=groups.remembered,
        tokens=groups.tokens,
        windows=groups.windows,
        means=means,
        scores=score(past.scores, past.means, past.groups(), windows),
    )
    return after.where(present, past)


def _remember(past: History, windows: Windows) -> Groups:
    """The groups with the oldest recent window among them, the two most alike merged."""
    groups = past.groups()
    if not len(groups.windows):
        return groups
    groups = groups._replace(tokens=groups.tokens * KEPT, windows=groups.windows * KEPT)
    share, tokens = windows.share[0], windows.tokens[0]
    return merge_two(groups, Groups(share, tokens, (tokens > 0).astype(jnp.float32)), windows)
