"""How panels share a figure: grids, scales, legends, and the prunings marked in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from analysis.agreement import ORDERS
from analysis.condition_names import by_condition
from analysis.conditions import comparisons, conditions
from analysis.names import names_of
from analysis.runs import Runs

from . import panels, scales
from .labels import layer_names, wrapped
from .room import in_pixels
from .style import DEPTH, Style, named_styles


def compared(prediction: xr.Dataset) -> np.ndarray:
    """Measured and predicted values in one array."""
    return prediction[["measured", *ORDERS]].to_array().values.ravel()


def symmetric(ax: Axes, values: np.ndarray) -> None:
    """Make a panel square, with the same scale on both axes and the line on which a prediction is exact."""
    for axis in (ax.xaxis, ax.yaxis):
        scales.scale_axis(axis, values, zeros=True)
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(4))
        scales.fit_axis(axis, values)
    if ax.get_yscale() != "linear":
        ax.xaxis.set_major_locator(FixedLocator(ax.get_yticks().tolist()))
    panels.draw_identity(panels.say_where_empty(ax))
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
    for ax in axes.flat[count - columns : count]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def alike(predictions: Mapping[str, xr.Dataset]) -> bool:
    """Whether one axis of steps suits all: the longest run is at most three times as long as the shortest."""
    last = [float(of.step[-1]) + 1 for of in predictions.values() if of.sizes["step"]]
    return max(last, default=1) <= 3 * min(last, default=1)


def of_one_size(predictions: Mapping[str, xr.Dataset]) -> bool:
    """Whether one scale suits all: their largest values lie within two decades."""
    sizes = [np.abs(values[np.isfinite(values)]).max(initial=0) for values in map(compared, predictions.values())]
    sizes = [size for size in sizes if size]
    return max(sizes, default=1) <= 100 * min(sizes, default=1)


def shared_axes(figure: Figure, axes: list[Axes], predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> None:
    """Scale all panels together if they share a y axis, else each by itself; only the outer ones are labelled."""
    values = [compared(prediction) for prediction in predictions.values()]
    shared = len(axes[0].get_shared_y_axes().get_siblings(axes[0])) > 1
    for ax, own in zip(axes, values, strict=False):
        scales.scale_axis(ax.yaxis, np.concatenate(values) if shared else own)
    for ax in axes:
        ax.set(ylabel="")
        ax.yaxis.set_tick_params(labelleft=not shared or ax.get_subplotspec().is_first_col())
    label_lowest(axes)
    figure.supylabel(ylabel, fontsize=9)


def label_lowest(axes: list[Axes]) -> None:
    """Put the label of a shared x axis under the lowest panel of each column only."""
    for ax in axes[: -axes[0].get_gridspec().ncols]:
        ax.set_xlabel("")


def named(ax: Axes, condition: str, *, panels: int = 1) -> None:
    """Title one or several panels in a row with their condition's name, in as many lines as it needs."""
    ax.set_title(wrapped(condition, int(19 * scales.width_in_inches(ax) * panels)), fontsize=8)


def headed(figure: Figure, what: str) -> None:
    """Write above all panels what they show, in as many lines as it needs."""
    figure.suptitle(wrapped(what, int(14 * figure.get_figwidth())) or None, x=0.01, ha="left", fontsize=10)


def legend_below(figure: Figure, *others: Line2D) -> None:
    """One legend below all panels: every label once, and further entries, in as many columns as fit."""
    drawn = [handle for ax in figure.axes for handle in ax.get_legend_handles_labels()[0]]
    handles = list({handle.get_label(): handle for handle in [*drawn, *others][::-1]}.values())[::-1]
    if handles:
        columns = len(handles)
        if _legend_width(figure, handles, columns) > figure.bbox.width:
            columns = min(columns, 1 + int(figure.bbox.width / _legend_width(figure, handles, 1)))
        while columns > 1 and _legend_width(figure, handles, columns) > figure.bbox.width:
            columns -= 1
        rows = -(-len(handles) // columns)
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))  # equal rows


def _legend_width(figure: Figure, handles: list[Artist], columns: int) -> float:
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    with in_pixels(figure) as renderer:
        width = legend.get_window_extent(renderer).width
    legend.remove()
    return width


def depth_bar(figure: Figure, axes: list[Axes], layers: Sequence[str]) -> None:
    """A bar with the colours of many layers below all panels; the first and the last layer are named."""
    figure.set_figheight(figure.get_figheight() + 0.6)
    scale = ScalarMappable(Normalize(0, len(layers) - 1), DEPTH)
    bar = figure.colorbar(scale, ax=axes, location="bottom", aspect=50, shrink=0.8, ticks=[0, len(layers) - 1])
    first, *_, last = layer_names(layers)
    beginning, end = bar.ax.set_xticklabels([first, last])
    beginning.set_horizontalalignment("left")
    end.set_horizontalalignment("right")
    bar.set_label(f"{len(layers)} layers")


def share_bar(figure: Figure, axes: list[Axes], what: str) -> None:
    """A bar with the colours of shares beside the panels that :func:`figures.panels.draw_layer_map` drew."""
    bar = figure.colorbar(axes[0].collections[0], ax=axes, label=what, pad=0.01, aspect=25)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1))


def rows_of(
    count: int, columns: int, *, width: float, height: float, least: float = 0
) -> tuple[Figure, list[list[Axes]]]:
    """Panels in ``count`` rows of ``columns`` each."""
    size = (max(width * columns, least), height * count + 0.6)
    figure, axes = plt.subplots(count, columns, figsize=size, squeeze=False)
    return figure, axes.tolist()


def events_of(
    runs: Runs, when: Callable[[xr.DataTree], tuple[Sequence[float], Sequence[float]]]
) -> dict[str, tuple[list[float], list[float]]]:
    """By condition, the times of all its runs' prunings, and those of their other events: in steps, or in epochs."""
    found = {}
    for condition, rows in by_condition(comparisons(runs)).items():
        every = [when(runs[label]) for label in rows.run]
        prunings, others = (sorted({time for times in kind for time in times}) for kind in zip(*every, strict=True))
        found[condition] = prunings, others
    return found


def models(runs: Runs, labels: Iterable[str]) -> dict[str, list[str]]:
    """Runs grouped by model and data set, under the printed names of these."""
    groups = conditions(runs).loc[list(labels)].groupby(["model", "data"], sort=False).groups
    printed = names_of({part for names in groups for part in names})
    return {", ".join(printed[part] for part in names if part): list(of) for names, of in groups.items()}


def by_measure(runs: Runs, labels: Iterable[str]) -> dict[str, Style]:
    """Style of each run: that of its measure, which the legend names once. Runs are ordered with measures in turns.

    So where many points overlap, no measure's points hide all others'.
    """
    measures = conditions(runs).measure[list(labels)]
    styles = named_styles(measures)
    turns = measures.groupby(measures).cumcount()
    order = sorted(measures.index, key=lambda label: (turns[label], list(styles).index(measures[label])))
    return {label: styles[measures[label]] | ({"label": None} if turns[label] else {}) for label in order}
