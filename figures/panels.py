"""Single panels: a dataset in, axes out. They draw what they are given and compute nothing."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from dynamics.schema import label

from .style import FIRST, MEASURED, SECOND

_ORDERS = {"first_order": FIRST, "second_order": SECOND}


def draw_over_time(prediction: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Measured (dots), first-order (dashed) and second-order (solid) values over ``step``."""
    ax = ax or plt.gca()
    for order, style in _ORDERS.items():
        ax.plot(prediction.step, prediction[order], **style)
    ax.plot(prediction.step, prediction.measured, **MEASURED)
    ax.set(xlabel="step", ylabel=_axis(prediction.measured))
    return ax


def draw_predicted_measured(
    prediction: xr.Dataset, order: str, *, ax: Axes | None = None, filled: bool = True, **style: object
) -> Axes:
    """Measured against predicted values of one order: one point each."""
    ax = ax or plt.gca()
    fill = {} if filled else {"markerfacecolor": "none"}
    ax.plot(prediction[order].values.ravel(), prediction.measured.values.ravel(), linestyle="none", **fill, **style)
    ax.set(xlabel="predicted", ylabel="measured")
    return ax


def draw_identity(ax: Axes) -> Axes:
    """The line on which a prediction is right, behind the points, within the limits that these have set."""
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color="0.7", linewidth=0.9, zorder=0)
    ax.set(xlim=(low, high), ylim=(low, high))
    return ax


def draw_layers(quantity: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """One line a layer over ``step``, coloured by depth from dark (input) to light (output)."""
    ax = ax or plt.gca()
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, quantity.sizes["layer"]))
    for colour, layer in zip(colours, quantity.layer.values, strict=True):
        ax.plot(quantity.step, quantity.sel(layer=layer), color=colour, linewidth=1, label=str(layer))
    ax.set(xlabel="step", ylabel=label(quantity.name))
    return ax


def draw_events(steps: Iterable[int], *, ax: Axes | None = None) -> Axes:
    """A vertical line at each event, between the step before it and the step after."""
    ax = ax or plt.gca()
    for step in steps:
        ax.axvline(step - 0.5, color="0.55", linewidth=0.9, linestyle=":", zorder=0)
    return ax


def draw_curve(curve: xr.DataArray, *, ax: Axes | None = None, **style: object) -> Axes:
    """A quantity over its one dimension, with the table's symbol as label."""
    ax = ax or plt.gca()
    (dim,) = curve.dims
    ax.plot(curve[dim], curve, **style)
    ax.set(xlabel=dim, ylabel=label(curve.name))
    return ax


def draw_over_layers(values: xr.DataArray, *, ax: Axes | None = None, **style: object) -> Axes:
    """A value a layer, over ``layer`` in the network's order."""
    ax = ax or plt.gca()
    positions = np.arange(values.sizes["layer"])
    ax.plot(positions, values, **style)
    ax.set_xticks(positions, values.layer.values, rotation=90, fontsize=7 if len(positions) <= 30 else 4)
    return ax


def draw_filters_left(share: xr.DataArray, *, ax: Axes | None = None, **style: object) -> Axes:
    """Share of filters left over ``layer``, in the network's order."""
    ax = ax or plt.gca()
    positions = np.arange(share.sizes["layer"])
    ax.plot(positions, share, **style)
    ax.set_xticks(positions, share.layer.values, rotation=45, ha="right")
    ax.set(ylim=(0, 1.04), ylabel="share of filters left")
    return ax


def scale_axis(axis: Axis, values: np.ndarray) -> None:
    """Logarithmic where no value is negative; else symmetric, linear below the first decile and 10⁻⁵ of the largest.

    Linear altogether where some are negative and their sizes span less than a factor 30.
    At most three ticks a side of zero, none so close to it that labels would meet.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    if not sizes.size:
        return
    if np.nanmin(values) >= 0:
        set_scale("log")
        if sizes.max() / sizes.min() < 300:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
        return
    if sizes.max() / np.quantile(sizes, 0.1) < 30:
        return
    lowest = int(np.floor(np.log10(max(np.quantile(sizes, 0.1), sizes.max() * 1e-5))))
    highest = int(np.floor(np.log10(sizes.max())))
    set_scale("symlog", linthresh=10.0**lowest, linscale=0.6)
    decades = [10.0**power for power in range(highest, lowest, -max(1, -(-(highest - lowest) // 3)))]
    axis.set_major_locator(FixedLocator([-decade for decade in decades] + [0.0] + decades[::-1]))
    axis.set_minor_locator(NullLocator())


def _axis(variable: xr.DataArray) -> str:
    unit = variable.attrs.get("units", "1")
    return variable.attrs.get("long_name", variable.name) + ("" if unit == "1" else f"  [{unit}]")
