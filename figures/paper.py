"""The figures, one function each: runs in, figure out. The first line of each docstring is the claim it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import analysis
from analysis import MissingQuantityError
from analysis.record import name_of
from dynamics.schema import label as label_of

from . import panels, pruning
from .layout import compared, event_epochs, event_steps, grid, legend_below, shared_axes, symmetric
from .style import FIRST, SECOND, run_styles, theme

Runs = Mapping[str, xr.DataTree]


def loss_decrease_scatter(runs: Runs) -> Figure:
    """The second-order expansion predicts the loss decrease of a step; the first order alone promises too much.

    Each point is one measured step: measured loss decrease on the step's own batch against −gᵀΔθ (left) and
    −gᵀΔθ − ½ΔθᵀHΔθ (right). On the grey line a prediction is exact.
    """
    predictions = analysis.each(runs, analysis.loss_decrease)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.9), sharex=True, sharey=True)
    for ax, order in zip(axes, ("first_order", "second_order"), strict=True):
        for label, style in run_styles(predictions).items():
            panels.draw_predicted_measured(
                predictions[label], order, ax=ax, label=name_of(label), alpha=0.75, markersize=3.5, **style
            )  # fmt: skip
        ax.set_title(order.replace("_", " "))
    for ax in axes:
        symmetric(ax, np.concatenate([compared(prediction) for prediction in predictions.values()]))
    axes[0].set(xlabel="predicted loss decrease  [L]", ylabel="measured loss decrease  [L]")
    axes[1].set(xlabel="predicted loss decrease  [L]", ylabel="")
    legend_below(figure, axes[0])
    return figure


def loss_decrease_over_time(runs: Runs) -> Figure:
    """Over training, measured loss decreases follow the second-order prediction step by step.

    Loss decrease of each measured step on its own batch, with the prunings as dotted lines.
    """
    return _over_time(runs, analysis.each(runs, analysis.loss_decrease), ylabel="loss decrease  [L]")


def norm_rate(runs: Runs) -> Figure:
    """Gradient flow moves the squared norm at −2θᵀg − 2λ‖θ‖²; a step of finite length Δt adds Δt‖g‖².

    d‖θ‖²/dt of the whole network in flow time, measured and predicted, averaged over windows of steps. Prunings,
    dotted. The prediction is gradient descent's: a momentum carries the flow only after about 1/(1−β) steps.
    """
    return _over_time(runs, analysis.each(runs, analysis.network_norm_rate), ylabel="d‖θ‖²/dt  [L]")


def quantities_per_layer(runs: Runs) -> Figure:
    """Norm, gradient and curvature differ by orders of magnitude between layers, and a pruning moves them at once.

    The quantities of each layer of the first pruned run over its steps. Prunings, dotted.
    """
    label = next((label for label, run in runs.items() if event_steps(run)), next(iter(runs)))
    run = runs[label]
    found = [(node, name) for node, name in _PER_LAYER if node in run.children and name in run[node].data_vars]
    if not found:
        raise MissingQuantityError("no quantity per layer in the record: record /steps or /curvature")
    figure, axes = grid(len(found), width=3.6, columns=2)
    for ax, (node, name) in zip(axes, found, strict=True):
        quantity = run[node][name].load()
        panels.draw_layers(quantity, ax=ax)
        panels.draw_events(event_steps(run), ax=ax)
        panels.scale_axis(ax.yaxis, quantity.values)
    layers = axes[0].get_legend_handles_labels()
    figure.legend(*layers, loc="outside right center", title="layer", fontsize=7, handlelength=1.2)
    figure.suptitle(name_of(label), x=0.01, ha="left", fontsize=10)
    return figure


def training_curves(runs: Runs) -> Figure:
    """Pruned early, a network trains on to nearly the accuracy of the whole one.

    Training loss and test accuracy after each epoch, before that epoch's pruning if any. Prunings, dotted.
    """
    curves = analysis.each(runs, analysis.training_curve)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4))
    for label, style in run_styles(curves).items():
        for ax, name in zip(axes, ("train_loss", "test_accuracy"), strict=True):
            if name in curves[label]:
                panels.draw_curve(curves[label][name], ax=ax, label=name_of(label), alpha=0.9, **style)
    for ax in axes:
        panels.draw_events({epoch + 2 for label in curves for epoch in event_epochs(runs[label])}, ax=ax)
        ax.xaxis.get_major_locator().set_params(integer=True)
    panels.scale_axis(axes[0].yaxis, axes[0].lines[0].get_ydata())
    axes[1].yaxis.set_major_formatter(plt.matplotlib.ticker.PercentFormatter(1, decimals=0))
    legend_below(figure, axes[0])
    return figure


def filters_left(runs: Runs) -> Figure:
    """At the same sparsity the measures take their filters from different layers.

    Share of each layer's filters that is left after the last pruning.
    """
    left = {label: found.share.isel(event=-1) for label, found in analysis.each(runs, analysis.filters_left).items()}
    layers = max(share.sizes["layer"] for share in left.values())
    figure, ax = plt.subplots(figsize=(max(7.2, 0.2 * layers + 2), 3.8))
    for label, style in run_styles(left).items():
        panels.draw_filters_left(left[label], ax=ax, label=name_of(label), alpha=0.9, **style)
    ax.tick_params(axis="x", labelsize=8 if layers <= 30 else 5)
    legend_below(figure, ax)
    return figure


def pruning_effect(runs: Runs) -> Figure:
    """What a pruning does to loss, gradient and flow is predicted as far as it is a small perturbation, and no further.

    Each point is one pruning at its fixed probe: measured against predicted change of the loss, of ‖g‖², of d‖θ‖²/dt
    and of θᵀHg. Open markers: first order; filled: second order, which θᵀHg does not have.
    """
    effects = analysis.each(runs, analysis.pruning_effect)
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 7.4))
    for ax, quantity in zip(axes.flat, next(iter(effects.values())).quantity.values, strict=True):
        chosen = {label: effect.sel(quantity=quantity) for label, effect in effects.items()}
        for label, style in run_styles(chosen).items():
            style = style | {"markersize": 5.5}
            panels.draw_predicted_measured(chosen[label], "first_order", ax=ax, filled=False, **style)
            panels.draw_predicted_measured(chosen[label], "second_order", ax=ax, label=name_of(label), **style)
        symmetric(ax, np.concatenate([compared(effect) for effect in chosen.values()]))
        ax.set(xlabel=f"predicted Δ{label_of(quantity)}", ylabel=f"measured Δ{label_of(quantity)}")
    orders = [
        Line2D([], [], marker="o", linestyle="none", color="0.3", markerfacecolor=face, label=name)
        for face, name in (("none", FIRST["label"]), ("0.3", SECOND["label"]))
    ]
    legend_below(figure, axes[0, 0], *orders)
    return figure


def stability(runs: Runs) -> Figure:
    """Where Δt gᵀHg/‖g‖² is above 2 the quadratic model says that a step of that flow time raises the loss.

    The ratio at each measured step; the line marks 2. With momentum a step's flow time is η/(1−β).
    """
    found = analysis.each(runs, analysis.stability)
    figure, ax = plt.subplots(figsize=(7.2, 3.8))
    for label, style in run_styles(found).items():
        panels.draw_curve(found[label].stability, ax=ax, label=name_of(label), alpha=0.85, linewidth=0.9, **style)
    ax.axhline(2, color="0.3", linewidth=1)
    panels.scale_axis(ax.yaxis, np.concatenate([ratio.stability.values for ratio in found.values()]))
    ax.set(ylabel="Δt gᵀHg/‖g‖²")
    legend_below(figure, ax)
    return figure


FIGURES: dict[str, Callable[[Runs], Figure]] = {
    figure.__name__: figure
    for figure in (
        loss_decrease_scatter,
        loss_decrease_over_time,
        norm_rate,
        quantities_per_layer,
        training_curves,
        filters_left,
        pruning_effect,
        pruning.pruning_effect_per_layer,
        pruning.removed_decrease,
        pruning.removal_curve,
        pruning.measure_agreement,
        pruning.scale_invariance,
        stability,
    )
}

_PER_LAYER = (
    ("steps", "param_sqnorm"),
    ("steps", "param_sqnorm_rate"),
    ("steps", "grad_sqnorm"),
    ("steps", "distance_sqnorm"),
    ("curvature", "grad_hess_grad"),
    ("curvature", "param_hess_grad"),
)


def draw(name: str, runs: Runs) -> Figure:
    """A figure by its name, in thetadot's style.

    Raises:
        ValueError: no such figure, or no runs. MissingQuantityError: no run recorded what the figure needs.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}")
    if not runs:
        raise ValueError("no runs to draw: give at least one record")
    with theme():
        return FIGURES[name](runs)


def claim(name: str) -> str:
    """The claim that a figure shows: the first line of its docstring."""
    return FIGURES[name].__doc__.strip().splitlines()[0]


def caption(name: str) -> str:
    """How to read a figure: the rest of its docstring."""
    return " ".join(FIGURES[name].__doc__.split("\n", 1)[1].split())


def _over_time(runs: Runs, predictions: Mapping[str, xr.Dataset], *, ylabel: str) -> Figure:
    """Measured and predicted values over the steps, a panel a run, with the prunings marked."""
    figure, axes = grid(len(predictions), sharey=True)
    for ax, (label, prediction) in zip(axes, predictions.items(), strict=True):
        panels.draw_over_time(prediction, ax=ax)
        panels.draw_events(event_steps(runs[label]), ax=ax)
        ax.set_title(name_of(label))
    shared_axes(figure, axes, predictions, ylabel=ylabel)
    legend_below(figure, axes[0])
    return figure
