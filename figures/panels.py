"""Single panels: a dataset in, axes out. They draw what they are given and compute nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from analysis.comparison import mean_and_interval
from dynamics.schema import label

from .style import FIRST, MEASURED, SECOND

_LAYER_SIZE = 7  # points

_ORDERS = {"first_order": FIRST, "second_order": SECOND}


def draw_over_time(prediction: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Measured (dots), first-order (dashed) and second-order (solid) values over ``step``."""
    ax = ax or plt.gca()
    for order, style in _ORDERS.items():
        ax.plot(prediction.step, prediction[order], **style)
    many = prediction.sizes["step"] > 100
    ax.plot(prediction.step, prediction.measured, **MEASURED | ({"markersize": 1.2} if many else {}))
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
    return draw_times([step - 0.5 for step in steps], ax=ax)


def draw_times(times: Iterable[float], *, ax: Axes | None = None) -> Axes:
    """A vertical dotted line at each of these places of the axis, over its grid and under what is drawn."""
    ax = ax or plt.gca()
    for time in times:
        ax.axvline(time, color="0.45", linewidth=1, linestyle=":", zorder=1.5)
    return ax


def draw_curve(curve: xr.DataArray, *, ax: Axes | None = None, **style: object) -> Axes:
    """A quantity over its one dimension, with the table's symbol as label."""
    ax = ax or plt.gca()
    (dim,) = curve.dims
    ax.plot(curve[dim], curve, **style)
    ax.set(xlabel=dim, ylabel=label(curve.name))
    return ax


def draw_median(summary: xr.Dataset, *, ax: Axes | None = None, **style: object) -> Axes:
    """The median over seeds of a quantity over its one dimension, in the band of its range; a dozen markers."""
    ax = ax or plt.gca()
    (dim,) = summary["median"].dims
    every = max(1, summary.sizes[dim] // 12)
    ax.plot(summary[dim], summary["median"], **{"markevery": every, "alpha": 0.9, "markersize": 3.5, **style})
    draw_band(summary, ax=ax, color=style.get("color"))
    ax.set(xlabel=dim)
    return ax


def draw_band(summary: xr.Dataset, *, ax: Axes | None = None, color: object = None) -> Axes:
    """From ``low`` to ``high``, as a band; nothing where they are not known."""
    ax = ax or plt.gca()
    (dim,) = summary.low.dims
    if summary.low.notnull().any():
        ax.fill_between(summary[dim], summary.low, summary.high, color=color, alpha=0.13, linewidth=0)
    return ax


def draw_seeds(
    values: Mapping[str, xr.DataArray], styles: Mapping[str, Mapping[str, object]], *, ax: Axes | None = None
) -> Axes:
    """A row a measure: its value in each seed (small), and their mean with its interval (large), which may leave."""
    ax = ax or plt.gca()
    rows = list(styles)
    for measure, of_seeds in values.items():
        row, style = rows.index(measure), dict(styles[measure])
        if not of_seeds.size:
            continue
        summary = mean_and_interval(of_seeds)
        half = [[float(summary.high - summary["mean"])]]
        ax.plot(of_seeds, np.full(of_seeds.size, row), **style | {"label": None, "alpha": 0.5, "markersize": 2.5},
                linestyle="none")  # fmt: skip
        ax.errorbar(
            [float(summary["mean"])], [row], xerr=np.repeat(half, 2, axis=0), **style, markersize=5.5, capsize=2
        )
    ax.set_yticks(range(len(rows)), [style["label"] for style in styles.values()])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    fit_axis(ax.xaxis, np.concatenate([np.ravel(of_seeds) for of_seeds in values.values()] or [[]]))
    return ax


def draw_over_layers(values: xr.DataArray, *, ax: Axes | None = None, **style: object) -> Axes:
    """A value a layer, over ``layer`` in the network's order; as many layers are named as there is room for."""
    ax = ax or plt.gca()
    layers = values.layer.values
    ax.plot(np.arange(len(layers)), values, **style)
    room = 72 * ax.figure.get_figwidth() * ax.get_position().width / (1.25 * _LAYER_SIZE)
    labelled = np.arange(0, len(layers), -(-len(layers) // int(room)))
    ax.set_xticks(labelled, layers[labelled], rotation=90, fontsize=_LAYER_SIZE)
    ax.set_xticks(np.arange(len(layers)), minor=True)
    return ax


def scale_axis(axis: Axis, values: np.ndarray) -> None:
    """Logarithmic where no value is negative; else symmetric, linear below the first decile and 10⁻⁵ of the ninth.

    Linear altogether where some are negative and their sizes span less than a factor 30.
    At most three ticks a side of zero, none so close to it that labels would meet.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    if not sizes.size:
        return
    if np.nanmin(values) >= 0:
        banded = bool(axis.axes.collections)  # a band that reaches zero ends at the edge; a line leaves zeros out
        set_scale("log", nonpositive="clip" if banded else "mask")
        if sizes.max() / sizes.min() < 8:
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        elif sizes.max() / sizes.min() < 300:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
        return
    if sizes.max() / np.quantile(sizes, 0.1) < 30:
        return
    lowest = int(np.floor(np.log10(max(np.quantile(sizes, 0.1), np.quantile(sizes, 0.9) * 1e-5))))
    highest = int(np.floor(np.log10(sizes.max())))
    set_scale("symlog", linthresh=10.0**lowest, linscale=0.6)
    span = highest - lowest
    apart = max(1, -(-span // (2 if span == 3 else 3)))
    decades = [10.0**power for power in range(highest, lowest, -apart)]
    axis.set_major_locator(FixedLocator([-decade for decade in decades] + [0.0] + decades[::-1]))
    axis.set_minor_locator(NullLocator())


def fit_axis(axis: Axis, values: np.ndarray) -> None:
    """Limits that hold the values with a margin, whatever else is drawn."""
    shown = values[np.isfinite(values) & ((values > 0) | (axis.get_scale() != "log"))]
    if shown.size:
        transform = axis.get_transform()
        low, high = (transform.transform(bound) for bound in (shown.min(), shown.max()))
        margin = 0.06 * ((high - low) or abs(high) or 1)
        bounds = transform.inverted().transform(np.array([low - margin, high + margin]))
        getattr(axis.axes, f"set_{axis.axis_name}lim")(*bounds)


def percent(axis: Axis) -> None:
    """Shares in per cent, with as many decimals as they need."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")


def _axis(variable: xr.DataArray) -> str:
    unit = variable.attrs.get("units", "1")
    return variable.attrs.get("long_name", variable.name) + ("" if unit == "1" else f"  [{unit}]")
