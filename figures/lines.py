"""How a line of values is drawn: across unsampled steps, with a cross where it ends, and in windows if it is long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .style import Style

_FEW = 30  # up to so many points, each is marked
_MANY = 500  # more points would be a solid block
_WINDOWS = 150
_PAUSE = 10  # a pause is more than so many times as long as the gaps beside it
_DOZEN = 12  # markers on a line of more than a few points

ENDED = "last finite value of a run"


def draw_line(
    x: np.ndarray, y: np.ndarray, *, ax: Axes, low: np.ndarray | None = None, high: np.ndarray | None = None,
    band: bool = True, zeros: bool = True, **style: Any,
) -> None:  # fmt: skip
    """Draw a line through the known values, in the band from ``low`` to ``high``.

    NaN between two values means that nothing was recorded there: the line goes on, unless the gap is more than ten
    times as long as those beside it, because recording paused. If NaN at the end lasts for longer than it ever did
    between values, the line ends at a cross. Many points are drawn as the median of windows, as are the bounds of the
    band; without bounds, it covers all values in these. If points are few, each is marked; else about a dozen are.
    ``band=False``: without a band, for so many lines that bands would hide them. ``zeros=False``: the axis has no place
    for zeros, so the line skips them like NaN.
    """
    x, y = np.asarray(x), np.asarray(y)
    known = ~np.isnan(y) & (zeros | (y != 0))
    ended = _ended(y)
    bounds = (np.median, np.median) if low is not None and high is not None else (np.min, np.max)
    low, high = (y if bound is None else np.asarray(bound) for bound in (low, high))
    x, y, low, high = x[known], y[known], low[known], high[known]
    if len(y) > _MANY:
        x, y, low, high = _windows((x, np.mean), (y, np.median), (low, bounds[0]), (high, bounds[1]))
    pauses = _pauses(x)
    y, low, high = (np.insert(of.astype(float), pauses, np.nan) for of in (y, low, high))
    x = np.insert(x, pauses, x[pauses])
    (line,) = ax.plot(x, y, **_marked(len(y), style))
    if band and np.any(low < high):
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.13, linewidth=0)
    finite = np.flatnonzero(np.isfinite(y))
    if ended and finite.size:
        mark_end(x[finite[-1:]], y[finite[-1:]], ax=ax, color=line.get_color())


def mark_end(x: np.ndarray, y: np.ndarray, *, ax: Axes, color: object) -> None:
    """Draw a cross at a run's last finite value, which a legend names once."""
    label = None if any(line.get_label() == ENDED for line in ax.lines) else ENDED
    ax.plot(x, y, "x", color=color, markersize=6, label=label, zorder=3)


def evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most ``most`` among ``count``, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _ended(y: np.ndarray) -> bool:
    """Whether the values at the end are not finite for longer than between any two samples before."""
    finite = np.flatnonzero(np.isfinite(y))
    if not finite.size:
        return False
    return len(y) - 1 - finite[-1] >= np.diff(finite).max(initial=1)


def _pauses(x: np.ndarray) -> np.ndarray:
    """Indices of the points after a gap that is much longer than the gaps before and after it."""
    gaps = np.diff(x)
    return 2 + np.flatnonzero(gaps[1:-1] > _PAUSE * np.maximum(gaps[:-2], gaps[2:]))


def _windows(*columns: tuple[np.ndarray, Callable]) -> Iterator[np.ndarray]:
    """Each column's windows, summed up by the function beside it."""
    return (np.array([summary(part) for part in np.array_split(of, _WINDOWS)]) for of, summary in columns)


def _marked(count: int, style: Style) -> Style:
    """The style with markers spaced so that they can be told apart; one or two points are always marked."""
    if "marker" in style and count > _FEW:
        return {"markevery": max(1, count // _DOZEN), **style}
    return style if "marker" in style or count not in (1, 2) else {"marker": "o", "markersize": 3.5, **style}
