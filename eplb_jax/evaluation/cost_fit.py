"""The cost of experts, fitted to measured times of steps."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from eplb_jax.checks import LoadLike
from eplb_jax.evaluation.regression import Model, Regression, independent, regress
from eplb_jax.evaluation.step_time import (
    SAME,
    Coefficients,
    CostFit,
    Windows,
    as_seconds,
    gpu_terms,
    slowest_terms,
    windows_of,
)
from eplb_jax.planning.cost import Cost
from eplb_jax.types import Placement, Topology

_LINEAR = np.array([np.inf, np.inf, np.inf, np.inf, 0])
"""Upper bounds of coefficients where there is no knee."""
_KNEES = np.linspace(0.1, 0.9, 9)
"""Quantiles of the tokens of most loaded GPUs at which the search for a knee starts."""
_KNEE_PENALTY = 4
"""Coefficients that a knee counts as in the information criterion: its place is searched for."""
_CLOCK = 0.1
"""Deviations are relative to times, and to this part of the median for smaller ones."""
_CONFIDENCE = 0.975
"""Confidence, one-sided, of what is said about whether time follows the load."""
_MATTERS = 0.5
"""Time does not follow the load if less than this part of it does."""


def fit_cost(
    load: LoadLike,
    placement: Placement | LoadLike,
    topology: Topology | int,
    seconds: ArrayLike,
    *,
    tile: int = 1,
    tokens_per_step: float | None = None,
    split: Literal["flexible"] | None = None,
) -> CostFit:
    """The cost of a replica from measured times. Runs on the host and cannot be traced.

    Time that grows with all tokens, such as that of attention, is told from the time of the most
    loaded GPU, which alone a plan changes: so imbalance must differ between windows. The fit is
    Huber's, so outliers count little, with coefficients of at least 0. There is a knee if the
    Bayesian information criterion prefers it. Errors count measurements as independent, with
    relative deviations of the same size; from fewer than some ten windows they are rough.

    Args:
        load: Tokens of every window, [T, L, E].
        placement: The plan that was in place, or its phy2log.
        topology: GPUs, slots and nodes of the plan; or the number of GPUs.
        seconds: [T], time of the window, in which every layer waits for its slowest GPU. [T, G],
            time of every GPU without waiting, over all layers; [T, L, G], by layer.
        tile: Tokens are rounded up to a multiple of it.
        tokens_per_step: As of `Cost`. None: every window is one step.
        split: "flexible": replicas share tokens as by `runtime.split_load`; the number of active
            experts is not known then. None: equally.

    Returns:
        The cost, its errors, and whether time follows the load at all.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Loads, plan, topology and seconds do not fit, a number is negative or not
            finite, or there are tiles with a split.

    Example:
        >>> load = [[[8, 4]], [[6, 6]], [[9, 3]], [[7, 5]], [[6, 6]], [[10, 2]]]
        >>> fit = fit_cost(load, [[0, 1]], 2, [2.8, 2.6, 2.9, 2.7, 2.6, 3.0])
        >>> fit.follows, round(fit.cost.per_token, 3), round(fit.value.fixed, 3)
        (True, 0.1, 2.0)

    References:
        Huber and Ronchetti, Robust Statistics, 2009. Schwarz, Estimating the dimension of a model,
        Annals of Statistics, 1978.
    """
    units = Cost(tile=tile, tokens_per_step=tokens_per_step)
    shape = {"tile": units.tile, "tokens_per_step": units.tokens_per_step}
    windows = windows_of(load, placement, topology, **shape, split=split)
    return fit_windows(windows, as_seconds("seconds", seconds, windows.tokens.shape), **shape)


def fit_windows(
    windows: Windows,
    measured: Float[np.ndarray, " T"] | Float[np.ndarray, "T G"] | Float[np.ndarray, "T L G"],
    *,
    tile: int = 1,
    tokens_per_step: float | None = None,
) -> CostFit:
    """`fit_cost` for windows that were counted in these units."""
    median = float(np.median(measured)) or 1.0
    # Times deviate by a part of them; those near zero, by the clock.
    size = np.maximum(measured, _CLOCK * median).ravel()
    relative = measured.ravel() / size

    def terms_at(value: np.ndarray) -> np.ndarray:
        terms = (slowest_terms if measured.ndim == 1 else gpu_terms)(windows, value)
        return (terms if measured.ndim == 3 else terms.sum(axis=1)).reshape(-1, 5)

    def model(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = terms_at(value) / size[:, None]
        return terms[:, :4] @ value[:4], terms

    shown, unseen = independent(terms_at(np.array([0.0, 0, 1, 0, 0]))[:, :4])
    if not shown.any():
        raise ValueError("load has no tokens, so nothing says what they cost; give other windows")
    free = np.append(shown, False)
    found = regress(model, relative, free, np.zeros(5), _LINEAR)
    bent = _with_knee(model, relative, free, found, windows)
    found, knee = (found, None) if bent is None else (bent, float(bent.value[4]))
    unseen = unseen if found.dof > 0 else np.eye(4)

    evidence, follows = _follows(found, terms_at(found.value)[:, :4], unseen, median)
    value = found.value
    if follows is False:
        free[2:] = False
        value, knee = regress(model, relative, free, np.zeros(5), _LINEAR).value, None
    error = np.sqrt(np.diag(found.covariance))
    error[2:4][np.any(unseen[:, 2:] != 0, axis=0)] = np.inf
    error[:2][~shown[:2]] = np.inf
    error[4] = np.inf if bent is None else error[4]
    times = {"per_token": float(value[2]), "per_active_expert": float(value[3])}
    return CostFit(
        Cost(**times, tile=tile, tokens_per_step=tokens_per_step) if follows else None,
        Coefficients(*value.tolist()),
        Coefficients(*(error if found.dof > 0 else np.full(5, np.inf)).tolist()),
        knee,
        found.scale,
        follows,
        evidence,
        found.covariance,
        unseen,
        tile,
        tokens_per_step,
    )


def _with_knee(
    model: Model,
    measured: Float[np.ndarray, " n"],
    free: Bool[np.ndarray, " 5"],
    plain: Regression,
    windows: Windows,
) -> Regression | None:
    """The fit with a knee; None if the criterion prefers the one without."""
    if not free[2] or plain.dof < _KNEE_PENALTY + 1 or plain.exact:
        return None
    tokens = windows.tokens.max(axis=2)[windows.steps > 0] / windows.steps[windows.steps > 0]
    guesses = [np.array([0, 0, 0, 0, x]) for x in np.unique(np.quantile(tokens, _KNEES)) if x > 0]
    free, most = free | (_LINEAR == 0), np.where(_LINEAR == 0, tokens.max(), _LINEAR)
    fits = [regress(model, measured, free, x, most, plain.scale) for x in guesses]
    start = min(fits, key=lambda x: x.loss, default=plain).value
    if start[4] == 0:
        return None
    best = regress(model, measured, free, start, most)
    ratio = max(best.variance / plain.variance, 1e-12)
    if len(measured) * np.log(ratio) + _KNEE_PENALTY * np.log(len(measured)) >= 0:
        return None
    seen, _ = independent(model(best.value)[1][:, free])
    return best if seen.all() else None


def _follows(
    found: Regression,
    terms: Float[np.ndarray, "n 4"],
    unseen: Float[np.ndarray, "r 4"],
    median: float,
) -> tuple[float, bool | None]:
    """By how many standard errors time follows the load, and whether it does.

    What is tested is the time of a standard deviation of tokens and of active experts together,
    which is known where the two vary only together.
    """
    spread = terms.std(axis=0) * [0, 0, 1, 1]
    doubt = float(np.sqrt(spread @ found.covariance[:4, :4] @ spread))
    hidden = np.abs(unseen @ spread) > SAME * (np.abs(unseen) @ terms.mean(axis=0))
    if found.dof < 1 or doubt == 0 or hidden.any():
        return 0.0, None
    evidence = float(spread @ found.value[:4]) / doubt
    bound = float(stdtrit(found.dof, _CONFIDENCE))
    most = found.value[:4] + bound * np.sqrt(np.diag(found.covariance)[:4])
    little = most[2:] * np.median(terms[:, 2:], axis=0) < _MATTERS * median
    little[0] &= not unseen[:, 2].any()
    return evidence, True if evidence > bound else False if little.all() else None
