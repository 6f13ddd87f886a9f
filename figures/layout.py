"""How panels share a figure: grids, scales, legends, and the prunings marked in them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.conditions import by_condition, comparisons, conditions
from analysis.record import pruning_steps

from . import panels
from .style import named_styles


def compared(prediction: xr.Dataset) -> np.ndarray:
    """Measured and predicted values, all together."""
    return prediction[["measured", "first_order", "second_order"]].to_array().values.ravel()


def symmetric(ax: Axes, values: np.ndarray) -> None:
    """The same scale on both axes, square, with the line on which a prediction is exact."""
    for axis in (ax.xaxis, ax.yaxis):
        panels.scale_axis(axis, values)
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(4))
    panels.draw_identity(ax)
    ax.set_aspect("equal", adjustable="box")


def grid(
    count: int,
    *,
    width: float = 2.5,
    height: float = 2.1,
    columns: int = 3,
    sharex: bool = True,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Panels in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(width * columns, 4.5), height * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=sharex, sharey=sharey, squeeze=False)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    for ax in axes.flat[count - columns : count]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def shared_axes(figure: Figure, axes: list[Axes], predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> None:
    """One scale for all panels, and labels on the outer ones only."""
    panels.scale_axis(axes[0].yaxis, np.concatenate([compared(prediction) for prediction in predictions.values()]))
    for ax in axes:
        ax.set(ylabel="")
        ax.yaxis.set_tick_params(labelleft=ax.get_subplotspec().is_first_col())
    label_lowest(axes)
    figure.supylabel(ylabel, fontsize=9)


def label_lowest(axes: list[Axes]) -> None:
    """The label of a shared x axis under the lowest panel of each column only."""
    for ax in axes[: -axes[0].get_gridspec().ncols]:
        ax.set_xlabel("")


def named(ax: Axes, condition: str, *, panels: int = 1) -> None:
    """Give one or several panels in a row the name of their condition for a title, in as many lines as they take."""
    inches = ax.get_position().width * ax.figure.get_figwidth() * panels
    ax.set_title(textwrap.fill(condition, int(20 * inches)), fontsize=8)


def headed(figure: Figure, what: str) -> None:
    """Say over all panels what they show, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(what, int(15 * figure.get_figwidth())) or None, x=0.01, ha="left", fontsize=10)


def legend_below(figure: Figure, *others: Line2D) -> None:
    """One legend for all panels, under them: every label once; with further entries."""
    drawn = [handle for ax in figure.axes for handle in ax.get_legend_handles_labels()[0]]
    handles = list({handle.get_label(): handle for handle in [*drawn, *others][::-1]}.values())[::-1]
    letters = sum(len(str(handle.get_label())) + 6 for handle in handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if letters < 70 else 3)


def rows_of(
    count: int, columns: int, *, width: float, height: float, least: float = 0
) -> tuple[Figure, list[list[Axes]]]:
    """Panels in ``count`` rows of ``columns`` each."""
    size = (max(width * columns, least), height * count + 0.6)
    figure, axes = plt.subplots(count, columns, figsize=size, squeeze=False)
    return figure, axes.tolist()


def prunings_of(
    runs: Mapping[str, xr.DataTree], when: Callable[[xr.DataTree], list[float]] = pruning_steps
) -> dict[str, list[float]]:
    """By condition, when the prunings of all its runs were: in steps, or in epochs."""
    return {
        condition: sorted({value for label in rows.run for value in when(runs[label])})
        for condition, rows in by_condition(comparisons(runs)).items()
    }


def by_measure(runs: Mapping[str, xr.DataTree], labels: Iterable[str]) -> dict[str, dict[str, object]]:
    """Style of each run: that of its measure, whose name stands in the legend once; the measures in turns.

    So of many points on each other those of no measure lie above all others'.
    """
    measures = conditions(runs).measure[list(labels)]
    styles = named_styles(measures)
    unnamed = {measure: style | {"label": None} for measure, style in styles.items()}
    of_label = {label: unnamed[measure] for label, measure in measures.items()}
    named = {measures[measures == measure].index[0]: style for measure, style in styles.items()}
    turns = measures.groupby(measures).cumcount()
    order = sorted(measures.index, key=lambda label: (turns[label], list(styles).index(measures[label])))
    return {label: named.get(label, of_label[label]) for label in order}
