"""Single panels: a dataset in, axes out. They draw what they are given and compute nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from analysis.comparison import mean_and_interval
from analysis.given import check, check_axes, check_order, check_prediction, check_steps
from dynamics.schema import QUANTITIES, label

from .labels import layer_names
from .lines import draw_line, evenly, mark_end
from .scales import count_axis, fit_axis, width_in_inches
from .style import DEPTH, LINES, MEASURED, OTHER_EVENT, PRUNING, Style

_LAYER_SIZE = 7  # points
FEW_LAYERS = 15  # up to so many, a legend names them
MANY_LAYERS = 24  # with more, the points of several measures cannot be told apart
_DOTS = 60  # more measured dots would hide the predictions


def _axes(ax: Axes | None) -> Axes:
    """The axes to draw on: the current ones, if none are given."""
    check(ax is None or isinstance(ax, Axes), "an Axes as ax, such as one of those that plt.subplots() returns", ax)
    return plt.gca() if ax is None else ax


def draw_over_time(prediction: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Measured (dots), first-order (dashed) and second-order (solid) values over ``step``; many dots are thinned."""
    check_prediction(prediction, "step")
    ax = _axes(ax)
    for order, style in LINES.items():
        draw_line(prediction.step.values, prediction[order].values, ax=ax, **style)
    measured = prediction.measured.dropna("step")
    dots = measured.isel(step=evenly(measured.sizes["step"], _DOTS))
    ax.plot(dots.step, dots, **MEASURED | ({"markersize": 2} if dots.size > _DOTS // 2 else {}))
    ax.set(xlabel="step", ylabel=_axis(prediction.measured))
    count_axis(ax.xaxis)
    return ax


def draw_predicted_measured(prediction: xr.Dataset, order: str, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Measured against predicted values of one order, one point per pair."""
    check_prediction(prediction)
    check_order(order, prediction)
    ax = _axes(ax)
    ax.plot(prediction[order].values.ravel(), prediction.measured.values.ravel(), linestyle="none", **style)
    ax.set(xlabel="predicted", ylabel="measured")
    return ax


def draw_identity(ax: Axes | None = None) -> Axes:
    """The line on which a prediction is exact, behind the points and within their limits."""
    ax = _axes(ax)
    low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color="0.7", linewidth=0.9, zorder=0)
    ax.set(xlim=(low, high), ylim=(low, high))
    return ax


def draw_layers(quantity: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """One line per layer over ``step``, coloured by depth from dark (input) to light (output), named if they are few.

    ``step`` may also be a coordinate, of events say. Where no value is negative and the axis is logarithmic, lines skip
    zeros: in a network whose optimizers take turns, each layer's gradient is drawn at the steps in which it is trained.
    """
    check_axes(quantity, "layer", "step")
    ax = _axes(ax)
    names = layer_names(quantity.layer.values)
    few = len(names) <= FEW_LAYERS
    finite = quantity.where(np.isfinite(quantity))
    logarithmic = bool((finite > 0).any() and not (finite < 0).any())
    colours = DEPTH(np.linspace(0, 1, len(names)))
    for colour, layer, name in zip(colours, quantity.layer.values, names, strict=True):
        named = f"layer {name}" if name.isdigit() else name
        style = {"color": colour, "linewidth": 1, "label": named if few else None}
        values = quantity.sel(layer=layer).values
        draw_line(quantity.step.values, values, ax=ax, band=few, zeros=not logarithmic, **style)
    ax.set(xlabel="step", ylabel=label(quantity.name) if quantity.name in QUANTITIES else _axis(quantity))
    count_axis(ax.xaxis)
    return ax


def draw_events(steps: Collection[float], others: Collection[float] = (), *, ax: Axes | None = None) -> Axes:
    """Vertical lines at prunings and at other events, each between the step before it and the step after it."""
    for numbers in (steps, others):
        check_steps(numbers)
    return draw_times([step - 0.5 for step in steps], [step - 0.5 for step in others], ax=ax)


def draw_times(times: Iterable[float], others: Iterable[float] = (), *, ax: Axes | None = None) -> Axes:
    """A vertical line at each pruning (dotted) and other event (dash-dotted), over the grid and under what is drawn."""
    ax = _axes(ax)
    for places, style in ((times, PRUNING), (others, OTHER_EVENT)):
        for number, time in enumerate(dict.fromkeys(places)):
            ax.axvline(time, linewidth=1, zorder=1.5, **style | ({"label": None} if number else {}))
    return ax


def say(text: str, *, ax: Axes) -> None:
    """Write a text in the middle of a panel that has nothing to show."""
    ax.text(0.5, 0.5, text, color="0.4", backgroundcolor="white", transform=ax.transAxes, ha="center", va="center")


def say_where_empty(ax: Axes) -> Axes:
    """If none of a panel's points is finite, say so in its middle, and remove the ticks that are its own."""
    drawn = (line.get_xydata() for line in ax.lines if line.get_transform() is ax.transData)  # not one across the panel
    if not any(np.isfinite(points).all(1).any() for points in drawn):
        say("no finite value", ax=ax)
        shared = {"labelbottom": ax.get_shared_x_axes(), "labelleft": ax.get_shared_y_axes()}
        own = [name for name, axes in shared.items() if len(axes.get_siblings(ax)) < 2]
        hidden: Style = dict.fromkeys(own, False)
        ax.tick_params(length=0, **hidden)
    return ax


def draw_median(summary: xr.Dataset, *, ax: Axes | None = None, **style: Any) -> Axes:
    """The median over seeds of a quantity over its one dimension, with the band of quartiles; few points are marked.

    A cross marks where one of several seeds ends or is last finite; beyond it, the median is that of the others.
    """
    ax = _axes(ax)
    (dim,) = summary["median"].dims
    x, median, low, high, seeds = (summary[name].values for name in (dim, "median", "low", "high", "seeds"))
    draw_line(x, median, ax=ax, low=low, high=high, **{"alpha": 0.9, "markersize": 3.5, **style})
    to_come = np.maximum.accumulate(seeds[::-1])[::-1]  # the most seeds at any place from here on
    fewer = np.flatnonzero((np.diff(to_come) < 0) & (to_come[1:] > 0))
    if fewer.size:
        mark_end(x[fewer], median[fewer], ax=ax, color=style.get("color"))
    ax.set(xlabel=dim)
    count_axis(ax.xaxis)
    return ax


def draw_seeds(values: Mapping[str, xr.DataArray], styles: Mapping[str, Style], *, ax: Axes | None = None) -> Axes:
    """One row per measure: its value in each seed (small) and their mean with its interval (large).

    The interval may extend beyond the axis.
    """
    ax = _axes(ax)
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
    fit_axis(ax.xaxis, np.concatenate([np.ravel(of_seeds) for of_seeds in values.values()] or [np.empty(0)]))
    return ax


def draw_over_layers(values: xr.DataArray, *, ax: Axes | None = None, beside: float = 0.0, **style: Any) -> Axes:
    """One point per layer, in the network's order; as many layers are named as there is room for.

    ``beside``: offset from the layer's place, in layers, to show several series beside each other.
    """
    check_axes(values, "layer")
    ax = _axes(ax)
    names = layer_names(values.layer.values)
    ax.plot(np.arange(len(names)) + beside, values, **{"marker": "o", **style, "linestyle": "none"})
    _name_layers(ax, names)
    return ax


def draw_layer_map(values: Mapping[str, xr.DataArray], *, ax: Axes | None = None) -> Axes:
    """One row per name and one column per layer, in the network's order: shares from 0 to 1 as colours.

    If networks differ in their layers, each row has its own only.
    """
    ax = _axes(ax)
    layers = list(dict.fromkeys(layer for shares in values.values() for layer in shares.layer.values.tolist()))
    names, rows = layer_names(layers), [shares.reindex(layer=layers) for shares in values.values()]
    edges = np.arange(len(names) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    ax.pcolormesh(*edges, np.stack(rows), vmin=0, vmax=1, cmap="viridis")
    ax.set_yticks(np.arange(len(rows)), list(values))
    ax.invert_yaxis()
    ax.grid(False)
    _name_layers(ax, names)
    return ax


def draw_layer_bars(summary: xr.Dataset, *, ax: Axes | None = None, beside: float = 0.0, color: object = None) -> Axes:
    """A bar from ``low`` to ``high`` at each layer, or ``beside`` it; none where these are unknown."""
    ax = _axes(ax)
    ax.vlines(
        np.arange(summary.sizes["layer"]) + beside, summary.low, summary.high, color=color, alpha=0.35, linewidth=1
    )
    return ax


def _name_layers(ax: Axes, names: list[str]) -> None:
    """One tick per layer, with its name; if not all fit side by side, upright, as many as there is room for."""
    room = 72 * width_in_inches(ax) / _LAYER_SIZE  # in heights of a letter, which are about 0.65 wide
    beside = len(names) * (0.65 * max(map(len, names), default=0) + 1) <= room
    labelled = np.arange(0, len(names), 1 if beside else -(-len(names) // max(1, int(room / 1.25))))
    shown = [names[place] for place in labelled]
    ax.set_xticks(labelled, shown, rotation=0 if beside else 90, fontsize=_LAYER_SIZE)
    ax.set_xticks(np.arange(len(names)), minor=True)
    ax.set_xlabel("layer")


def _axis(variable: xr.DataArray) -> str:
    unit = variable.attrs.get("units", "1")
    return variable.attrs.get("long_name", variable.name) + ("" if unit == "1" else f"  [{unit}]")
