"""The interval of a mean over seeds."""

from __future__ import annotations

import numpy as np
import scipy  # scipy.stats is loaded on first use
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


def half_width(values: ArrayLike, axis: int = -1) -> np.ndarray:
    """Half the width of Student's 95% interval of the mean along ``axis``: t₀.₉₇₅(n−1) s/√n.

    NaN for n < 2, and where a value is not finite.

    Student's rather than the bootstrap's: the three seeds that runs usually have allow only ten different bootstrap
    samples, and no interval from them extends beyond the range of the data. That range misses the true mean whenever
    all three seeds err to the same side, one time in four. Student's interval covers 95% at every n, provided that
    seeds scatter about normally, which three of them cannot show.
    """
    values = np.asarray(values, float)
    count = values.shape[axis]
    if count < 2:
        return np.full(values.sum(axis).shape, np.nan)
    with np.errstate(invalid="ignore"):  # an infinite value minus an infinite mean
        deviation = values.std(axis, ddof=1)
    return scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation / np.sqrt(count)


def p_value(values: ArrayLike) -> float:
    """p of Student's two-sided test that the mean is 0, which matches :func:`half_width`'s interval; NaN for n < 2."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(values.mean()) / (values.std(ddof=1) / np.sqrt(len(values)))
    return float(2 * scipy.stats.t.sf(np.nan_to_num(t, nan=0.0, posinf=np.inf), len(values) - 1))


def stand(p: ArrayLike) -> np.ndarray:
    """Which of several tests reject their nulls, at a false discovery rate of 5% (Benjamini and Hochberg 1995).

    Of the rejections, at most one in twenty is expected to be wrong. A test whose p is NaN does not count.
    """
    p = np.asarray(p, float)
    found = np.zeros(p.shape, bool)
    known = ~np.isnan(p)
    if known.any():
        found[known] = scipy.stats.false_discovery_control(p[known]) <= 1 - CONFIDENCE
    return found
