"""The time of a step as a sum of terms: the model that `fit_cost` fits, and what a fit predicts."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_load
from eplb_jax.evaluation.metrics import gpu_loads
from eplb_jax.planning.cost import Cost
from eplb_jax.planning.placement import as_placement
from eplb_jax.types import Placement, Topology

SAME = 5e-3
"""Relative differences below this are none: a column that varies less counts as constant."""


class Coefficients(NamedTuple):
    """The time of a step: a sum over layers, each of which waits for its slowest GPU.

    Attributes:
        fixed: Seconds of a step of all layers that no load changes.
        shared: Seconds per token of the mean GPU: time that grows with tokens wherever they go.
        per_token: Seconds per token of the slowest GPU of a layer, rounded up to tiles.
        per_active_expert: Seconds per replica with at least one token on that GPU.
        knee: Tokens of a GPU in a step of a layer below which fewer tokens save no time; 0: none.
    """

    fixed: float
    shared: float
    per_token: float
    per_active_expert: float
    knee: float


class CostFit(NamedTuple):
    """A cost fitted to measured times.

    A step takes fixed + shared * mean, and for every layer the maximum over GPUs of
    per_token * max(tokens, knee) + per_active_expert * active. In a window of many steps, these
    are means: what waiting for chance adds in single steps is part of the other coefficients.

    Attributes:
        cost: The cost of a replica; None unless `follows` is True.
        value: The coefficients.
        error: Their standard errors. Infinite for one that the windows do not show, because its
            term does not vary, or only together with others: it is 0, and the coefficients of
            the others include its time.
        knee: As in `value`; None if there is none, or time does not follow the load.
        residual: Robust standard deviation of the residuals, relative to the measured times.
        follows: True: time follows the load of the slowest GPU. False: less than half of it does,
            and the fit is that of a time that does not. Both with 97.5 % confidence. None: these
            windows do not tell.
        evidence: By how many standard errors time follows the load.
        covariance: Of the coefficients, without the part that the windows do not show.
        unseen: Combinations of the first four coefficients that the windows do not show.
        tile: Tokens are rounded up to a multiple of it.
        tokens_per_step: As of `Cost`.
    """

    cost: Cost | None
    value: Coefficients
    error: Coefficients
    knee: float | None
    residual: float
    follows: bool | None
    evidence: float
    covariance: Float[np.ndarray, "5 5"]
    unseen: Float[np.ndarray, "r 4"]
    tile: int
    tokens_per_step: float | None

    def predict(
        self,
        load: LoadLike,
        placement: Placement | LoadLike,
        topology: Topology | int,
        *,
        split: Literal["flexible"] | None = None,
    ) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " T"]]:
        """Seconds of every window under a plan, [T], and their standard errors from the fit.

        An error is infinite where the plan changes what the fit has not seen. Arguments and
        errors are those of `fit_cost`.
        """
        terms = self._terms(load, placement, topology, split).sum(axis=1)
        return terms[:, :4] @ np.array(self.value[:4]), self._error(terms, np.abs(terms))

    def saving(
        self,
        load: LoadLike,
        old: Placement | LoadLike,
        new: Placement | LoadLike,
        topology: Topology | int,
        *,
        split: Literal["flexible"] | None = None,
    ) -> tuple[Float[np.ndarray, "T L"], float]:
        """Seconds that a new plan saves, and the fit's standard error of its mean over windows.

        That mean is of the sum over layers. Arguments and errors are those of `fit_cost`.
        """
        before, after = (self._terms(load, x, topology, split) for x in (old, new))
        saved = before - after
        mean, size = saved.sum(axis=1).mean(axis=0), np.abs(before).sum(axis=1).mean(axis=0)
        error = self._error(mean[None], size[None])
        return saved[..., :4] @ np.array(self.value[:4]), float(error[0])

    def _terms(
        self,
        load: LoadLike,
        placement: Placement | LoadLike,
        topology: Topology | int,
        split: Literal["flexible"] | None,
    ) -> Float[np.ndarray, "T L 5"]:
        units = {"tile": self.tile, "tokens_per_step": self.tokens_per_step}
        windows = windows_of(load, placement, topology, **units, split=split)
        return slowest_terms(windows, np.array(self.value))

    def _error(
        self, terms: Float[np.ndarray, "n 5"], size: Float[np.ndarray, "n 5"]
    ) -> Float[np.ndarray, " n"]:
        """The errors of sums of terms, which are rounded relative to `size`."""
        known = np.sqrt(np.maximum(((terms @ self.covariance) * terms).sum(axis=1), 0))
        rounding = SAME * (size[:, :4] @ np.abs(self.unseen.T))
        new = np.abs(terms[:, :4] @ self.unseen.T) > rounding
        return np.where(new.any(axis=1), np.inf, known)


class Windows(NamedTuple):
    """What the GPUs do in every window.

    Attributes:
        tokens: Tokens of every GPU, rounded up to tiles.
        active: Replicas with a token, summed over steps; zero where that is not known.
        mean: Tokens of the mean GPU; zero where there is but one.
        steps: Number of steps.
    """

    tokens: Float[np.ndarray, "T L G"]
    active: Float[np.ndarray, "T L G"]
    mean: Float[np.ndarray, "T L"]
    steps: Float[np.ndarray, "T L"]


def windows_of(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    *,
    tile: int = 1,
    tokens_per_step: float | None = None,
    split: Literal["flexible"] | None = None,
) -> Windows:
    """The windows of a load under a plan; a load without windows is one.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: They do not fit, or there are tiles with a split.
    """
    array = as_load(load, "load")
    plan = as_placement(placement, "placement", array.shape[-1])
    if split is not None and tile != 1:
        raise ValueError(f"tile={tile} counts replicas with equal shares; nearest with split: 1")
    if split is not None:
        tokens = gpu_loads(array, plan, topology, split=split)
        active = np.zeros(tokens.shape)
    else:
        rounded = Cost(tile=tile, tokens_per_step=tokens_per_step)
        reads = Cost(per_token=0, per_active_expert=1, tokens_per_step=tokens_per_step)
        tokens, active = (gpu_loads(array, plan, topology, cost=x) for x in (rounded, reads))
    layers = 1 if array.ndim == 1 else array.shape[-2]
    shape = -1, layers, tokens.shape[-1]
    tokens, active = (np.asarray(x, np.float64).reshape(shape) for x in (tokens, active))
    total = np.asarray(array, np.float64).sum(axis=-1).reshape(shape[:2])
    steps = np.ones(total.shape) if tokens_per_step is None else total / tokens_per_step
    mean = total / shape[2] if shape[2] > 1 else np.zeros(total.shape)
    return Windows(tokens, active, mean, steps)


def gpu_terms(windows: Windows, value: Float[np.ndarray, " 5"]) -> Float[np.ndarray, "T L G 5"]:
    """What one unit of every coefficient adds to the time of every GPU.

    The last is the derivative by the knee. The time is the sum of the others times the
    coefficients.
    """
    floor = value[4] * windows.steps[..., None]
    below = value[2] * np.where(windows.tokens < floor, windows.steps[..., None], 0)
    tokens = np.maximum(windows.tokens, floor)
    fixed = windows.steps[..., None] / windows.steps.shape[1]
    columns = fixed, windows.mean[..., None], tokens, windows.active, below
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def slowest_terms(windows: Windows, value: Float[np.ndarray, " 5"]) -> Float[np.ndarray, "T L 5"]:
    """`gpu_terms` of the slowest GPU; of GPUs below the knee, the one with most tokens."""
    tokens = np.maximum(windows.tokens, value[4] * windows.steps[..., None])
    time = value[2] * tokens + value[3] * windows.active
    each = value[2] + value[3] * windows.active.sum() / max(windows.tokens.sum(), 1)
    time = time + 1e-9 * (each or 1) * windows.tokens
    slowest = time.argmax(axis=-1)[..., None]
    tokens, active = (np.take_along_axis(x, slowest, axis=-1) for x in windows[:2])
    return gpu_terms(Windows(tokens, active, *windows[2:]), value)[:, :, 0]


def as_seconds(
    name: str, value: ArrayLike, shape: tuple[int, int, int]
) -> Float[np.ndarray, " T"] | Float[np.ndarray, "T G"] | Float[np.ndarray, "T L G"]:
    """Measured times of windows, for loads of GPUs of that shape.

    Raises:
        TypeError: They are not numbers.
        ValueError: They have another shape, or are negative or not finite.
    """
    try:
        seconds = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {value!r}") from None
    shapes = shape[:1], (shape[0], shape[2]), shape
    if seconds.shape not in shapes:
        raise ValueError(
            f"{name} must have the shape {shapes[0]}, got {seconds.shape}; or, of GPUs, "
            f"{shapes[1]}, or by layer {shapes[2]}"
        )
    if not np.all(np.isfinite(seconds) & (seconds >= 0)):
        bad = seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]
        raise ValueError(f"{name} must be finite and not negative, got {bad}; nearest: 0")
    return seconds
