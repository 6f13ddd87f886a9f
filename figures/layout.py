"""How panels share a figure: grids, scales, legends, and the prunings marked in them."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import panels


def event_steps(run: xr.DataTree) -> list[int]:
    """Step of each event of a run."""
    return run["pruning"]["step"].values.tolist() if "step" in run["pruning"].data_vars else []


def event_epochs(run: xr.DataTree) -> list[int]:
    """Epoch of each event of a run."""
    return run["pruning"]["epoch"].values.tolist() if "epoch" in run["pruning"].data_vars else []


def compared(prediction: xr.Dataset) -> np.ndarray:
    """Measured and predicted values, all together."""
    return prediction[["measured", "first_order", "second_order"]].to_array().values.ravel()


def symmetric(ax: Axes, values: np.ndarray) -> None:
    """The same scale on both axes, square, with the line on which a prediction is exact."""
    for axis in (ax.xaxis, ax.yaxis):
        panels.scale_axis(axis, values)
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
    return figure, list(axes.flat[:count])


def shared_axes(figure: Figure, axes: list[Axes], predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> None:
    """One scale for all panels, and labels on the outer ones only."""
    panels.scale_axis(axes[0].yaxis, np.concatenate([compared(prediction) for prediction in predictions.values()]))
    for ax in axes:
        ax.set(ylabel="")
        ax.label_outer()
    figure.supylabel(ylabel, fontsize=9)


def legend_below(figure: Figure, ax: Axes, *others: Line2D) -> None:
    """The legend of one panel, for all, under them; with further entries."""
    handles = [*ax.get_legend_handles_labels()[0], *others]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
