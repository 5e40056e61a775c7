"""The best scale of one block by looking at every scale at which a code changes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def least_error(x: F64, w: F64, levels: F64) -> float:
    """min over d and codes of sum w (x - d level)^2, for real d of either sign.

    The nearest level of x / d changes only where x / d meets a midpoint between levels, so one d
    from every gap between those, followed by least squares, sees all there is.
    """
    levels = np.sort(levels)
    midpoints = (levels[1:] + levels[:-1]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.unique((midpoints[:, None] / x[None, :]).ravel())
    inverse = inverse[np.isfinite(inverse)]
    if not inverse.size:
        return float((w * x**2).sum())
    gaps = (inverse[1:] + inverse[:-1]) / 2
    trials = np.concatenate([[inverse[0] - 1], gaps, [inverse[-1] + 1]])
    codes = np.searchsorted(midpoints, trials[:, None] * x[None, :])
    q = levels[codes]
    top, bottom = (w * x * q).sum(axis=1), (w * q * q).sum(axis=1)
    saved = np.divide(top**2, bottom, out=np.zeros_like(top), where=bottom > 0)
    return float((w * x**2).sum() - saved.max())


def least_error_of_scales(x: F64, w: F64, levels: F64, scales: F64) -> float:
    """min over the given scales of sum w (x - d level)^2."""
    levels = np.sort(levels)
    grid = scales[:, None, None] * levels[None, None, :]
    nearest = np.abs(x[None, :, None] - grid).min(axis=2)
    return float((w * nearest**2).sum(axis=1).min())
