"""The figures, one function each: runs in, figure out. The first line of each docstring is the claim it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

import analysis
from analysis import MissingQuantityError
from analysis.agreement import ORDERS
from analysis.comparison import title
from analysis.conditions import by_setting, conditions
from analysis.findings import in_layers
from analysis.names import name_of
from analysis.prunings import in_steps
from analysis.record import columns, has
from analysis.runs import Runs
from dynamics.schema import label as label_of

from . import claims, comparison, panels, pruning, scales
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
from .room import settle
from .style import theme


def loss_decrease_scatter(runs: Runs) -> Figure:
    """How far the first and the second order predict the loss decrease of single steps.

    Each point is one measured step: measured loss decrease on the step's own batch against −gᵀΔθ (left) and
    −gᵀΔθ − ½ΔθᵀHΔθ (right). On the grey line a prediction is exact.
    """
    predictions = analysis.each(runs, analysis.loss_decrease)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), sharex=True, sharey=True)
    for ax, order in zip(axes, ("first_order", "second_order"), strict=True):
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
    """How predicted and measured loss decreases of single steps go together over training.

    Loss decrease of each measured step on its own batch; of many steps, dots show some. A panel a measure: of several
    conditions the first that was pruned, in one seed.
    """
    return _over_time(runs, analysis.each(runs, analysis.loss_decrease), ylabel="loss decrease  [L]")


def norm_rate(runs: Runs) -> Figure:
    """Gradient flow moves the squared norm at −2θᵀg − 2λ‖θ‖²; a step of finite length Δt adds Δt‖g‖².

    d‖θ‖²/dt of the whole network in flow time, measured and predicted, averaged over windows of steps. The
    prediction is gradient descent's: a momentum carries the flow only after about 1/(1−β) steps. A panel a measure: of
    several conditions the first that was pruned, in one seed.
    """
    return _over_time(runs, analysis.each(runs, analysis.network_norm_rate), ylabel="d‖θ‖²/dt  [L]")


def quantities_per_layer(runs: Runs) -> Figure:
    """How far norm, gradient and curvature of the layers lie apart, and how a pruning moves them.

    The quantities of each layer over the steps of one run, of the first pruned one if any; d‖θ‖²/dt as measured,
    averaged over windows of steps.
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


def pruning_effect(runs: Runs) -> Figure:
    """What a pruning does to loss, gradient and flow is predicted as far as it is a small perturbation, and no further.

    Each point is one pruning at its fixed probe: measured against predicted change of the loss, of ‖g‖², of d‖θ‖²/dt
    and of θᵀHg, in first order (top) and in second (bottom), which θᵀHg does not have. On the grey line a prediction is
    exact.
    """
    effects = analysis.each(runs, analysis.effect_of_prunings)
    quantities = next(iter(effects.values())).quantity.values
    figure, axes = plt.subplots(2, len(quantities), figsize=(2.6 * len(quantities), 5.8))
    for column, quantity in zip(axes.T, quantities, strict=True):
        chosen = {label: effect.sel(quantity=quantity) for label, effect in effects.items()}
        values = np.concatenate([compared(effect) for effect in chosen.values()])
        for ax, order in zip(column, ORDERS, strict=True):
            for label, style in by_measure(runs, chosen).items():
                panels.draw_predicted_measured(chosen[label], order, ax=ax, alpha=0.7, **style | {"markersize": 3.5})
            ax.set_visible(any(effect[order].notnull().any() for effect in chosen.values()))
            symmetric(ax, values)
            ax.set(xlabel=f"predicted Δ{label_of(quantity)}", ylabel=f"measured Δ{label_of(quantity)}")
            ax.set_title(order.replace("_", " "))
    legend_below(figure)
    return figure


FIGURES: dict[str, Callable[[Runs], Figure]] = {
    figure.__name__: figure
    for figure in (
        loss_decrease_scatter,
        loss_decrease_over_time,
        norm_rate,
        comparison.norms,
        quantities_per_layer,
        comparison.training_curves,
        comparison.accuracy,
        comparison.convergence,
        comparison.filters_left,
        pruning_effect,
        comparison.loss_and_gradient_at_pruning,
        pruning.pruning_effect_per_layer,
        pruning.removed_decrease,
        pruning.removal_curve,
        pruning.measure_agreement,
        pruning.scale_invariance,
        comparison.stability,
        claims.claims,
    )
}

_PANELS = 12  # of one run each

_PER_LAYER = (
    ("steps", "param_sqnorm"),
    ("steps", "grad_sqnorm"),
    ("steps", "distance_sqnorm"),
    ("curvature", "grad_hess_grad"),
    ("curvature", "param_hess_grad"),
)


def draw(name: str, runs: Runs) -> Figure:
    """A figure by its name, in thetadot's style.

    Runs of one measure are laid side by side by the setting in which they differ, if they do: a learning rate, say.

    Raises:
        ValueError: no such figure, or no runs. MissingQuantityError: no run recorded what the figure needs.
    """
    figure = find_figure(name)
    if not runs:
        raise ValueError("no runs to draw: give at least one record")
    shown = by_setting(runs)
    with theme(_measures(shown)):
        drawn = figure(shown)
        settle(drawn)
    return drawn


def find_figure(name: str) -> Callable[[Runs], Figure]:
    """The figure of a name.

    Raises:
        ValueError: there is no such figure; the message lists those there are.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}")
    return FIGURES[name]


def _measures(runs: Runs) -> list[str]:
    """By which the runs were pruned, and behind them those that they compared."""
    compared = [
        columns(run, "scores", ["measure"]).measure.values.tolist() for run in runs.values() if has(run, "scores")
    ]
    return list(dict.fromkeys([*conditions(runs).measure, *(name for names in compared for name in names)]))


def claim(name: str) -> str:
    """The claim that a figure shows: the first line of its docstring."""
    return find_figure(name).__doc__.strip().splitlines()[0]


def compares(name: str) -> bool:
    """Whether a figure lays measures side by side: its claim is about several."""
    return find_figure(name).__module__ == comparison.__name__


def caption(name: str) -> str:
    """How to read a figure: the rest of its docstring."""
    return " ".join(find_figure(name).__doc__.split("\n", 1)[1].split())


def _per_layer(run: xr.DataTree) -> list[xr.DataArray]:
    """What the record has of norm, gradient and curvature by layer, over its steps."""
    found = [columns(run, node, [name])[name] for node, name in _PER_LAYER if has(run, node, name)]
    with suppress(MissingQuantityError):
        found.insert(1, analysis.layer_norm_rate(run))
    return found


def _over_time(runs: Runs, predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> Figure:
    """Measured and predicted values over the steps, a panel a measure in one seed, with the events marked."""
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
