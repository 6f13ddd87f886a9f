"""Figures of single steps, predicted and measured: runs in, figure out. Each docstring opens with its claim."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import analysis
from analysis import MissingQuantityError
from analysis.agreement import ORDERS
from analysis.comparison import title
from analysis.conditions import conditions
from analysis.findings import in_layers
from analysis.names import name_of
from analysis.prunings import in_steps
from analysis.record import columns, has
from analysis.runs import Runs

from . import panels, scales
from .labels import wrapped
from .layout import (
    alike,
    by_measure,
    compared,
    depth_bar,
    grid,
    headed,
    label_lowest,
    legend_below,
    of_one_size,
    shared_axes,
    symmetric,
)
from .lines import evenly

_PANELS = 12  # at most, of one run each

_PER_LAYER = (
    ("steps", "param_sqnorm"),
    ("steps", "grad_sqnorm"),
    ("steps", "distance_sqnorm"),
    ("curvature", "grad_hess_grad"),
    ("curvature", "param_hess_grad"),
)


def loss_decrease_scatter(runs: Runs) -> Figure:
    """How well the first and the second order predict the loss decrease of single steps.

    One point per measured step: measured loss decrease on the step's own batch against −gᵀΔθ (left) and −gᵀΔθ − ½ΔθᵀHΔθ
    (right). On the grey line, the prediction is exact.
    """
    predictions = analysis.each(runs, analysis.loss_decrease)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), sharex=True, sharey=True)
    for ax, order in zip(axes, ORDERS, strict=True):
        for label, style in by_measure(runs, predictions).items():
            panels.draw_predicted_measured(predictions[label], order, ax=ax, alpha=0.6, markersize=3.5, **style)
        ax.set_title(order.replace("_", " "))
    for ax in axes:
        symmetric(ax, np.concatenate([compared(prediction) for prediction in predictions.values()]))
    axes[0].set(xlabel="predicted loss decrease  [L]", ylabel="measured loss decrease  [L]")
    axes[1].set(xlabel="predicted loss decrease  [L]", ylabel="")
    legend_below(figure)
    return figure


def loss_decrease_over_time(runs: Runs) -> Figure:
    """How predicted and measured loss decreases of single steps compare over training.

    Loss decrease of each measured step on its own batch; of many steps, dots show a selection. Lines of more than 500
    steps are medians of windows, with a band over all values in these. One panel per measure and one seed each; with
    several conditions, those of the first that was pruned.
    """
    return _over_time(runs, analysis.each(runs, analysis.loss_decrease), ylabel="loss decrease  [L]")


def norm_rate(runs: Runs) -> Figure:
    """Gradient flow moves the squared norm at −2θᵀg − 2λ‖θ‖²; a step of finite length Δt adds Δt‖g‖².

    d‖θ‖²/dt of the whole network in flow time, measured and predicted, averaged over windows of steps. The prediction
    is that of gradient descent; with momentum, steps follow the flow only after about 1/(1−β) of them. Lines of more
    than 500 steps are medians of windows, with a band over all values in these. One panel per measure and one seed
    each; with several conditions, those of the first that was pruned.
    """
    return _over_time(runs, analysis.each(runs, analysis.network_norm_rate), ylabel="d‖θ‖²/dt  [L]")


def quantities_per_layer(runs: Runs) -> Figure:
    """How much norm, gradient and curvature differ between layers, and how a pruning changes them.

    The quantities of each layer over the steps of one run, the first pruned one if there is any; d‖θ‖²/dt as measured,
    averaged over windows of steps. Lines of more than 500 steps are medians of windows, with a band over all values in
    these, unless there are many layers.
    """
    label = in_layers(runs)
    run = runs[label]
    found = _per_layer(run)
    if not found:
        raise MissingQuantityError("no quantity per layer in the record: record /steps or /curvature")
    figure, axes = grid(len(found), width=3.6, columns=2)
    for ax, quantity in zip(axes, found, strict=True):
        panels.say_where_empty(panels.draw_layers(quantity, ax=ax))
        scales.scale_axis(ax.yaxis, np.concatenate([line.get_ydata() for line in ax.lines]))
        panels.draw_events(*in_steps(run), ax=ax)
    label_lowest(axes)
    if found[0].sizes["layer"] > panels.FEW_LAYERS:
        depth_bar(figure, axes, found[0].layer.values)
    legend_below(figure)
    headed(figure, title(label, runs))
    return figure


def _per_layer(run: xr.DataTree) -> list[xr.DataArray]:
    """The record's quantities of norm, gradient and curvature by layer, over its steps."""
    found = [columns(run, node, [name])[name] for node, name in _PER_LAYER if has(run, node, name)]
    with suppress(MissingQuantityError):
        found.insert(1, analysis.layer_norm_rate(run))
    return found


def _over_time(runs: Runs, predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> Figure:
    """Measured and predicted values over the steps, one panel per measure in one seed, with the events marked."""
    what, chosen = analysis.side_by_side({label: runs[label] for label in predictions})
    shown = [list(chosen)[place] for place in evenly(len(chosen), _PANELS)]
    some = f"{len(shown)} of {len(chosen)} runs" if len(shown) < len(chosen) else ""
    predictions = {label: predictions[label] for label in shown}
    figure, axes = grid(len(predictions), sharex=alike(predictions), sharey=of_one_size(predictions))
    measures = conditions(chosen).measure
    for ax, (label, prediction) in zip(axes, predictions.items(), strict=True):
        panels.draw_over_time(prediction, ax=ax)
        panels.draw_events(*in_steps(runs[label]), ax=ax)
        ax.set_title(wrapped(name_of(measures[label])))
    headed(figure, ", ".join(filter(None, [what, some])))
    shared_axes(figure, axes, predictions, ylabel=ylabel)
    for ax in axes:
        panels.say_where_empty(ax)
    legend_below(figure)
    return figure
