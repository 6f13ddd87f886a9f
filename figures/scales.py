"""Scales, limits and ticks of an axis, derived from the values that are drawn on it."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.ticker import (
    FixedLocator,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

Axis = XAxis | YAxis

_STEPS = (1, 2, 5, 10)  # nice multiples


def scale_axis(axis: Axis, values: np.ndarray, *, zeros: bool = False) -> None:
    """Set a logarithmic scale if no value is negative, else a symmetric one or, for a narrow range, a linear one.

    The symmetric scale is linear below the first decile and 10⁻⁵ of the ninth; the whole scale is linear if some values
    are negative and their sizes span less than a factor of 30.

    Args:
        axis: an axis of a panel.
        values: all that are drawn; inf and NaN are ignored.
        zeros: zeros count as values, which makes the scale symmetric; else a logarithmic scale leaves them out.
    """
    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return
    if values.min() > 0 or (values.min() == 0 and not zeros):
        _logarithmic(axis, sizes)
    elif sizes.max() / 30 >= np.quantile(sizes, 0.1):
        _symmetric(axis, values, sizes)


def fit_axis(axis: Axis, values: np.ndarray) -> None:
    """Set limits that contain the values with a margin, whatever else is drawn."""
    shown = values[np.isfinite(values) & ((values > 0) | (axis.get_scale() != "log"))]
    if shown.size:
        transform = axis.get_transform()
        low, high = (transform.transform(bound) for bound in _bounds(axis, shown))
        margin = 0.06 * ((high - low) or abs(high) or 1)
        bounds = transform.inverted().transform(np.array([low - margin, high + margin]))
        getattr(axis.axes, f"set_{axis.axis_name}lim")(*bounds)


def percent(axis: Axis) -> None:
    """Label shares in per cent, with as many decimals as needed, and no ticks below 0 or above 100%."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%" if -1e-9 < share < 1 + 1e-9 else "")
    if axis.get_scale() != "log":
        low, high = axis.get_view_interval()
        margin = 0.03 * (min(high, 1) - max(low, 0))  # keeps a marker on the bound whole
        getattr(axis.axes, f"set_{axis.axis_name}lim")(max(low, -margin), min(high, 1 + margin))


def count_axis(axis: Axis) -> None:
    """Set ticks at whole numbers, of steps or epochs, as many as there is room for."""
    room = max(5, round(3 * width_in_inches(axis.axes)))
    axis.set_major_locator(MaxNLocator(room, steps=_STEPS, integer=True, min_n_ticks=1))


def width_in_inches(ax: Axes) -> float:
    """The width of a panel, which may be one of a figure's part."""
    return ax.bbox.width / ax.get_figure(root=True).dpi


def _logarithmic(axis: Axis, sizes: np.ndarray) -> None:
    banded = bool(axis.axes.collections)  # a band that reaches zero ends at the edge; a line leaves zeros out
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", nonpositive="clip" if banded else "mask")
    if sizes.max() / 300 < sizes.min():
        narrow = sizes.max() / 8 < sizes.min()
        bins = 4 if sizes.max() / 3 < sizes.min() else 7  # equal ones are wide at the lower end, narrow at the upper
        axis.set_major_locator(MaxNLocator(bins, steps=_STEPS) if narrow else LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(LogLocator(subs=range(1, 10)))  # also at powers of ten, where a label may be missing
        plain = sizes.min() >= 1e-4 and sizes.max() < 1e5
        powers = LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf))  # infinite: all ticks get labels
        axis.set_major_formatter(StrMethodFormatter("{x:g}") if plain else powers)
    axis.set_minor_formatter(NullFormatter())


def _symmetric(axis: Axis, values: np.ndarray, sizes: np.ndarray) -> None:
    """Ticks at zero, where the linear part ends, and one or two decades beyond it, on each side that has values."""
    lowest = _power(max(np.quantile(sizes, 0.1), np.quantile(sizes, 0.9) * 1e-5))
    span = _power(sizes.max()) - lowest
    getattr(axis.axes, f"set_{axis.axis_name}scale")("symlog", linthresh=10.0**lowest, linscale=max(0.7, 0.2 * span))
    parts = 1 if axis.axis_name == "x" else 2
    ticks = [0.0]
    for sign in (-1, 1):
        side = sign * values[sign * values > 0]
        if side.size:
            highest = max(lowest, _power(side.max()))
            apart = max(1, -(-(highest - lowest) // parts))
            ticks += [sign * 10.0**power for power in range(lowest, highest + 1, apart)]
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_minor_locator(NullLocator())
    bounds = [bound for bound in _bounds(axis, values) if bound not in (values.min(), values.max())]
    if bounds:  # so that a tick is there where negative values are
        places = [(bound, 0.0) if axis.axis_name == "x" else (0.0, bound) for bound in bounds]
        axis.axes.update_datalim(places, updatex=axis.axis_name == "x", updatey=axis.axis_name == "y")
    axis.axes.autoscale_view()  # margins that were taken on the linear scale may be decades on this one


def _bounds(axis: Axis, values: np.ndarray) -> tuple[float, float]:
    """The least and the largest value; on a symmetric scale, at least the linear part on each side that has values."""
    low, high = float(values.min()), float(values.max())
    if axis.get_scale() == "symlog":
        threshold = axis.get_transform().linthresh  # type: ignore[attr-defined]
        low = min(low, -threshold) if low < 0 else low
        high = max(high, threshold) if high > 0 else high
    return low, high


def _power(size: float) -> int:
    """The power of ten of the leading digit."""
    return int(np.floor(np.log10(size)))
