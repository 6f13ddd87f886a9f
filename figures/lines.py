"""How a line of values is drawn: whole where it was sampled, ended where it stops, in windows where it is long."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

_FEW = 30  # points, each of which is marked
_MANY = 500  # points: more are a solid block
_WINDOWS = 150
_PAUSE = 10  # gaps beside one
_DOZEN = 12  # markers of a line of more than a few points

ENDED = "last finite value of a run"


def draw_line(
    x: np.ndarray, y: np.ndarray, *, ax: Axes, low: np.ndarray | None = None, high: np.ndarray | None = None,
    band: bool = True, zeros: bool = True, **style: object,
) -> None:  # fmt: skip
    """A line through the values that are known, in the band from ``low`` to ``high``.

    A NaN between two values is a place where nothing was recorded: the line goes on, but not over a gap ten times as
    long as those beside it, as where recording paused. Where NaN lasts to the end for longer than it ever did between
    values, the line ends at a cross. Of many points the line is the median of windows,
    and the band holds all in them. Few points are marked each, many a dozen times. So many lines that their bands
    would hide them are drawn without: ``band=False``. Where the axis has no place for zeros, ``zeros=False``, the line
    is that of the others, and goes on over zeros as over NaN.
    """
    x, y = np.asarray(x), np.asarray(y)
    known = ~np.isnan(y) & (zeros | (y != 0))
    ended = _ended(y)
    low, high = (y if bound is None else np.asarray(bound) for bound in (low, high))
    x, y, low, high = x[known], y[known], low[known], high[known]
    if len(y) > _MANY:
        x, y, low, high = _windows(x, y, low, high)
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
    """A cross where a run has its last finite value."""
    ax.plot(x, y, "x", color=color, markersize=6, label=ENDED, zorder=3)


def evenly(count: int, most: int) -> np.ndarray:
    """Places of at most so many among ``count``, the first and the last with them, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _ended(y: np.ndarray) -> bool:
    """Whether no value is finite for longer at the end than ever before: not between two samples."""
    finite = np.flatnonzero(np.isfinite(y))
    if not finite.size:
        return False
    return len(y) - 1 - finite[-1] >= np.diff(finite).max(initial=1)


def _pauses(x: np.ndarray) -> np.ndarray:
    """Places behind a gap that is much longer than the one before it and the one after it."""
    gaps = np.diff(x)
    return 2 + np.flatnonzero(gaps[1:-1] > _PAUSE * np.maximum(gaps[:-2], gaps[2:]))


def _windows(x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = np.array_split(np.arange(len(x)), _WINDOWS)
    found = [(x[part].mean(), np.median(y[part]), low[part].min(), high[part].max()) for part in parts]
    return tuple(np.array(found).T)


def _marked(count: int, style: dict[str, object]) -> dict[str, object]:
    """The style with its markers so often that they are seen; a line of less than three points is made of them."""
    if "marker" in style and count > _FEW:
        return {"markevery": max(1, count // _DOZEN), **style}
    return style if "marker" in style or count not in (1, 2) else {"marker": "o", "markersize": 3.5, **style}
