"""The pages that :func:`figures.explore` shows, in HTML: a figure, a prediction or a quantity, with its text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import analysis
from analysis.comparison import title
from analysis.conditions import by_setting
from analysis.prunings import in_steps
from analysis.record import columns
from analysis.runs import Runs
from dynamics.record.errors import RecordError
from dynamics.schema import SPEEDS
from dynamics.schema import label as label_of

from . import panels, scales
from .catalogue import caption, claim, draw, finding
from .layout import compared, depth_bar, headed, legend_below
from .lines import draw_line
from .room import settle
from .style import theme

PREDICTIONS: dict[str, Callable[[xr.DataTree], xr.Dataset]] = {
    "loss decrease of a step": analysis.loss_decrease,
    "d‖θ‖²/dt of the network": analysis.network_norm_rate,
}
WHOLE = "whole network"

_DOTS = 110  # per inch of a picture
_SIZE = (7.2, 3.6)  # inches


def figure_page(runs: Runs, name: str, labels: Iterable[str]) -> str:
    """A figure of the chosen runs, in HTML: its claim, the picture, how to read it, and what was found."""
    chosen, heading = {label: runs[label] for label in labels}, f"<h4>{html.escape(claim(name), quote=False)}</h4>"
    if not chosen:
        return _said("No run is chosen.")
    try:
        picture = _picture(draw(name, chosen))
    except RecordError as error:
        return heading + _said(f"Not drawn: {error}")
    return f"{heading}{picture}{_said(caption(name), finding(name, by_setting(chosen)))}"


def prediction_page(runs: Runs, label: str, prediction: str, window: tuple[int, int]) -> str:
    """Predicted and measured values in a window of steps, ends included, in HTML, and how well they agree."""
    run = runs[label]
    try:
        found = PREDICTIONS[prediction](run).sel(step=slice(*window))
    except RecordError as error:
        return _said(str(error))
    with theme():
        figure, ax = plt.subplots(figsize=_SIZE)
        panels.draw_over_time(found, ax=ax)
        scales.scale_axis(ax.yaxis, compared(found))
        _finish(figure, title(label, runs), run, window)
    return _picture(figure) + analysis.agree(found).to_dataframe().T.round(3).to_html(border=0)


def quantity_page(
    runs: Runs, label: str, quantity: tuple[str, str], layers: Iterable[str], window: tuple[int, int]
) -> str:
    """A quantity of the chosen layers over a window of steps, ends included, in HTML."""
    (node, name), run = quantity, runs[label]
    try:
        values = columns(run, node, [name])[name].sel(step=slice(*window))
    except RecordError as error:
        return _said(str(error))
    if not (chosen := _chosen(values, list(layers))):
        return _said("No layer of the run is chosen.")
    name_of_whole = WHOLE if "layer" in values.dims else None
    with theme():
        figure, ax = plt.subplots(figsize=_SIZE)
        for one in chosen:
            if "layer" in one.dims:
                panels.draw_layers(one, ax=ax)
                if one.sizes["layer"] > panels.FEW_LAYERS:
                    depth_bar(figure, [ax], one.layer.values)
            else:
                draw_line(one.step.values, one.values, ax=ax, color="0.1", label=name_of_whole)
                ax.set(xlabel="step", ylabel=label_of(values.name))
        drawn = np.concatenate([line.get_ydata() for line in ax.lines])
        if len(np.unique(drawn[np.isfinite(drawn)])) > 1:
            scales.scale_axis(ax.yaxis, drawn)
        _finish(figure, title(label, runs), run, window)
    return _picture(figure) + _said(values.attrs.get("description", ""))


def _chosen(values: xr.DataArray, layers: list[str]) -> list[xr.DataArray]:
    """The quantity of the chosen layers, and of the whole network as the sum over all layers."""
    if "layer" not in values.dims:
        return [values]
    if WHOLE in layers and values.name in SPEEDS:
        return [values]
    of = values.sel(layer=[layer for layer in values.layer.values if layer in layers])
    whole = [values.sum("layer", skipna=False)] if WHOLE in layers else []
    return ([of] if of.sizes["layer"] else []) + whole


def _finish(figure: Figure, heading: str, run: xr.DataTree, window: tuple[int, int]) -> None:
    """Add to a single panel over steps the events in its window, a legend and a heading."""
    (ax, *_) = figure.axes
    within = [[step for step in steps if window[0] < step <= window[1]] for steps in in_steps(run)]
    panels.draw_events(*within, ax=ax)
    panels.say_where_empty(ax)
    legend_below(figure)
    headed(figure, heading)
    settle(figure)


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    with theme():
        figure.savefig(buffer, format="png", dpi=_DOTS)
    plt.close(figure)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" style="max-width: 100%">'


def _said(*sentences: str) -> str:
    return "".join(f"<p>{html.escape(sentence, quote=False)}</p>" for sentence in sentences if sentence)
