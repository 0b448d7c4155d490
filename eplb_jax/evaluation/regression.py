"""Robust regression with coefficients that are not negative, and their standard errors."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import least_squares, nnls

Model = Callable[
    [Float[np.ndarray, " p"]], tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n p"]]
]
"""Predictions and their derivatives, from the coefficients."""

_TUNING = 1.345
"""Huber's constant: 95 % of the efficiency of least squares where errors are normal."""
_OUTLIER = 2.5
"""Standard deviations beyond which the size of a residual says nothing."""
_NORMAL_MAD = 1.4826
"""Standard deviation of normal errors / their median absolute deviation."""
_PRECISION = 1e-6
"""Relative errors below this are those of loads in float32."""
_VARIES = 1e-3
"""Part of a column, relative to its size, that others must leave over for it to count."""
_ROUNDS = 20


class Regression(NamedTuple):
    """The coefficients of a model, and how well they are known.

    Attributes:
        value: The coefficients; those that were not free are as they were.
        covariance: Of the free ones; zero for others.
        scale: Robust standard deviation of residuals, in the unit of what was measured.
        loss: Sum of Huber's losses, in units of the scale.
        variance: Sum of squared residuals, none of them counted as more than 2.5 scales.
        dof: Measurements less free coefficients.
        exact: Whether the residuals are those of loads in float32.
    """

    value: Float[np.ndarray, " p"]
    covariance: Float[np.ndarray, "p p"]
    scale: float
    loss: float
    variance: float
    dof: int
    exact: bool


def independent(
    columns: Float[np.ndarray, "n p"],
) -> tuple[Bool[np.ndarray, " p"], Float[np.ndarray, "r p"]]:
    """Which columns are no combination of those before them, and the combinations that are zero."""
    size = np.linalg.norm(columns, axis=0)
    unit = columns / np.where(size > 0, size, 1)
    kept: list[int] = []
    zero = []
    for j in range(columns.shape[1]):
        share = np.linalg.lstsq(unit[:, kept], unit[:, j])[0]
        if size[j] > 0 and np.linalg.norm(unit[:, j] - unit[:, kept] @ share) > _VARIES:
            kept.append(j)
            continue
        combination = np.zeros(columns.shape[1])
        combination[j] = 1.0
        if size[j] > 0:
            shown = np.where(np.abs(share) > _VARIES, share, 0)
            combination[kept] = -shown * size[j] / size[kept]
        zero.append(combination)
    free = np.isin(np.arange(columns.shape[1]), kept)
    return free, np.array(zero).reshape(-1, columns.shape[1])


def regress(
    model: Model,
    measured: Float[np.ndarray, " n"],
    free: Bool[np.ndarray, " p"],
    guess: Float[np.ndarray, " p"],
    most: Float[np.ndarray, " p"],
    scale: float | None = None,
) -> Regression:
    """Huber's M-estimate of the free coefficients, each from 0 to `most`.

    Args:
        model: Predictions and derivatives.
        measured: What was measured.
        free: The coefficients to fit.
        guess: Values of those that are not fitted, and of bounded ones to start from.
        most: Upper bounds; infinite for those that the model is linear in.
        scale: Standard deviation of the errors. None: from the median absolute residual, in turn
            with the fit.

    References:
        Huber and Ronchetti, Robust Statistics, 2009, chapter 7; its equation (7.83) is the
        covariance.
    """
    dof = len(measured) - int(free.sum())
    size = float(np.median(np.abs(measured))) or 1.0
    columns = model(guess)[1]
    linear = free & np.isinf(most)
    unit = np.where(linear, size / np.where(linear, np.abs(columns).max(axis=0), 1), guess)[free]
    value = np.where(linear, 0, guess)
    value[linear] = nnls(columns[:, linear] * unit[linear[free]], measured)[0]
    value[linear] *= unit[linear[free]]

    def place(x: np.ndarray) -> np.ndarray:
        full = value.copy()
        full[free] = x * unit
        return full

    def solve(error: float) -> np.ndarray:
        found = least_squares(
            lambda x: (model(place(x))[0] - measured) / error,
            value[free] / unit,
            jac=lambda x: model(place(x))[1][:, free] * unit / error,  # pyright: ignore[reportArgumentType]
            bounds=(0, most[free] / unit),
            method="dogbox",  # it ends exactly at a bound
            loss="huber",
            f_scale=_TUNING,
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-12,
        )
        return place(found.x)

    least = _PRECISION * size
    error = scale or _deviation(model(value)[0] - measured, dof, least)
    for _ in range(_ROUNDS):
        value, before = solve(error), error
        error = scale or _deviation(model(value)[0] - measured, dof, least)
        if abs(error - before) <= 1e-3 * before:
            break
    predicted, slopes = model(value)
    off = np.abs(predicted - measured) / error
    cut = np.minimum(off, _TUNING)
    loss = float((cut * (2 * off - cut)).sum())
    covariance = np.zeros((len(value), len(value)))
    if dof > 0:
        inside = max(float((off < _TUNING).mean()), 1 / len(off))
        correction = 1 + free.sum() / len(off) * (1 - inside) / inside
        variance = max(error**2 * float((cut**2).sum()) / dof, least**2) / inside**2
        scaled = slopes[:, free] * unit
        inverse = np.linalg.pinv(scaled.T @ scaled) * np.outer(unit, unit)
        covariance[np.ix_(free, free)] = correction**2 * variance * inverse
    near = float((np.minimum(off, _OUTLIER) ** 2).sum()) * error**2
    return Regression(value, covariance, error, loss, near, dof, error <= least)


def _deviation(residual: Float[np.ndarray, " n"], dof: int, least: float) -> float:
    """The standard deviation by the median; `least` where the fit is as exact as the loads."""
    share = np.sqrt(len(residual) / max(dof, 1))
    return max(_NORMAL_MAD * float(share * np.median(np.abs(residual))), least)
