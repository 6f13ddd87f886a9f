"""Figures of what pruning did to the dynamics: runs in, figure out. Each docstring opens with the claim it shows."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

import analysis
from analysis.agreement import ORDERS
from analysis.comparison import title
from analysis.effect import first_pruning_per_layer
from analysis.measures import WHOLE
from analysis.names import name_of
from analysis.pruning_findings import comparing
from analysis.record import columns
from analysis.runs import Runs
from dynamics.schema import label as label_of

from . import panels, scales
from .labels import plain
from .layout import by_measure, compared, grid, headed, legend_below, models, named, share_bar, symmetric
from .lines import draw_line
from .style import LINES, MEASURED, MODES, POINTS, run_styles

_OVERLAP_SHARE = 0.2


def pruning_effect(runs: Runs) -> Figure:
    """The effect of a pruning on loss, gradient and flow is predictable only as far as it is a small perturbation.

    One point per pruning, at its fixed probe: measured against predicted change of the loss, of ‖g‖², of d‖θ‖²/dt and
    of θᵀHg, in first order (top) and second order (bottom; none for θᵀHg). On the grey line, the prediction is exact.
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


def pruning_effect_per_layer(runs: Runs) -> Figure:
    """A pruning changes gradient and flow in every layer, including those it took nothing from.

    The first pruning of one run, layer by layer, at its fixed probe: measured and predicted changes of ‖g‖² and of
    d‖θ‖²/dt, which add up to those of the network, and what each layer's removal contributes to the predicted change of
    the loss.
    """
    name, effect = next(iter(analysis.each(runs, first_pruning_per_layer).items()))
    figure, axes = plt.subplots(3, 1, figsize=(7.2, 7.2), sharex=True)
    for ax, quantity in zip(axes, ("loss", "grad_sqnorm", "param_sqnorm_rate"), strict=True):
        chosen = effect.sel(quantity=quantity)
        for order, style in POINTS.items():
            if chosen[order].notnull().any():
                panels.draw_over_layers(chosen[order], ax=ax, **style)
        ax.axhline(0, color="0.7", linewidth=0.9, zorder=0)
        ax.set(ylabel=f"Δ{label_of(quantity)}")
        ax.label_outer()
        scales.scale_axis(ax.yaxis, compared(chosen), zeros=True)
        scales.fit_axis(ax.yaxis, compared(chosen))
        panels.say_where_empty(ax)
    named(axes[0], f"{title(name, runs)}, first pruning")
    legend_below(figure)
    return figure


def removed_decrease(runs: Runs) -> Figure:
    """How much of the first-order decrease of the loss the removed parameters carried depends on the measure.

    Along gradient flow, dL/dt = −‖g‖². Top: the share of ‖g‖² that each pruning removed at its probe, against the share
    of the parameters that it removed; logarithmic axes, one panel per model and data set. On the grey line, the removed
    parameters carried as much as average ones. Bottom: the share of each layer's own ‖g‖² that the first pruning
    removed, in one run per measure.
    """
    found = analysis.each(runs, analysis.removed_decrease)
    totals = {name: of[["decrease", "parameters"]].sum("layer", skipna=False) for name, of in found.items()}
    groups = models(runs, found)
    figure = plt.figure(figsize=(max(2.9 * len(groups), 7.2), 5.6))
    places = figure.add_gridspec(2, len(groups), height_ratios=(1.2, 1))
    for column, (name, labels) in enumerate(groups.items()):
        ax = figure.add_subplot(places[0, column])
        _draw_shares(ax, runs, {label: totals[label] for label in labels})
        ax.set(xlabel="parameters removed", ylabel="" if column else "their share of ‖g‖²")
        named(ax, name)
    below = figure.add_subplot(places[1, :])
    what, chosen = analysis.side_by_side({name: runs[name] for name in found})
    of_layer = {name: found[name].of_layer.isel(event=0) for name in chosen}
    styles = by_measure(chosen, chosen)
    if max(share.sizes["layer"] for share in of_layer.values()) > panels.MANY_LAYERS:
        panels.draw_layer_map({styles[name]["label"]: share for name, share in of_layer.items()}, ax=below)
        share_bar(figure, [below], "removed share of ‖g‖²")
    else:
        for name, style in styles.items():
            panels.draw_over_layers(of_layer[name], ax=below, **style | {"markersize": 3})
        below.set(ylabel="removed share of ‖g‖²")
        scales.percent(below.yaxis)
        panels.say_where_empty(below)
    named(below, what)
    legend_below(figure)
    return figure


def _draw_shares(ax: plt.Axes, runs: Runs, totals: Mapping[str, xr.Dataset]) -> None:
    for name, style in by_measure(runs, totals).items():
        ax.plot(
            totals[name].parameters, totals[name].decrease, linestyle="none", alpha=0.7, **style | {"markersize": 3}
        )
    ax.axline((0.1, 0.1), (1, 1), color="0.7", linewidth=0.9, zorder=0)
    for axis, share in ((ax.xaxis, "parameters"), (ax.yaxis, "decrease")):
        values = np.concatenate([total[share] for total in totals.values()])
        scales.scale_axis(axis, values)
        scales.fit_axis(axis, values)
        scales.percent(axis)
    panels.say_where_empty(ax)


def removal_curve(runs: Runs) -> Figure:
    """The first order counts a removed filter twice if expanded in all its parameters, once if in its output scale.

    Copies of one network with more and more filters removed, at one probe. Orange and blue: predicted from the last γ
    and β of each filter. Grey: predicted from all parameters that go with it, for the same pruned network. Last panel:
    relative error of the predicted change of the loss. Taken from the first event of the first run that has a curve.
    """
    curves = analysis.each(runs, analysis.removal_curve)
    name, curve = next((name, found.isel(event=0)) for name, found in curves.items())
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.6), sharex=True)
    for ax, quantity in zip(axes.flat, ("loss", "grad_sqnorm", "param_sqnorm_rate"), strict=False):
        _draw_directions(ax, curve.sel(quantity=quantity))
        ours = curve.sel(quantity=quantity, direction="output")
        shown = np.concatenate([ours.measured, ours.first_order, [0.0]])
        shown = shown[np.isfinite(shown)]
        margin = np.ptp(shown) / 2 or 1
        ax.set(ylabel=f"Δ{label_of(quantity)}", ylim=(shown.min() - margin, shown.max() + margin))
    loss = curve.sel(quantity="loss")
    error = np.abs(analysis.residuals(loss) / loss.measured)
    _draw_directions(axes[1, 1], error)
    axes[1, 1].set(xscale="log", yscale="log", ylabel="relative error of ΔL")
    for ax in axes[1]:
        ax.set(xlabel="share of the filters removed", xticks=curve.fraction.values)
        scales.percent(ax.xaxis)
        ax.xaxis.set_minor_locator(NullLocator())
    for ax in axes.flat:
        panels.say_where_empty(ax)
    headed(figure, title(name, runs))
    twice = [Line2D([], [], **style | {"color": "0.6", "label": f"{style['label']}, all parameters"})
             for style in LINES.values()]  # fmt: skip
    legend_below(figure, *twice)
    return figure


def _draw_directions(ax: plt.Axes, curve: xr.Dataset) -> None:
    for direction in ("parameters", "output"):
        for order, style in LINES.items():
            values = curve[order].sel(direction=direction)
            own = POINTS[order] | style if direction == "output" else style | {"color": "0.6", "label": None}
            if values.notnull().any():
                draw_line(curve.fraction.values, values.values, ax=ax, **own)
    if "measured" in curve:
        ax.plot(curve.fraction, curve.measured, **MEASURED)


def measure_agreement(runs: Runs) -> Figure:
    """Measures that agree less with each other than with themselves on other batches differ in kind, not by noise.

    From the first run that compared measures at its events. Top: Spearman's rank correlation with the reference
    measure, and the overlap with it in the lowest fifth of the filters (grey: expected by chance), over training.
    Bottom: the rank correlation in each layer at the first event, and that of each measure's scores with its scores on
    batches drawn again. Error bars: one standard error.
    """
    what, reference, agreement, overlap, noise, steps = _compared_measures(runs)
    figure, axes = grid(4, width=3.9, columns=2, height=2.7, sharex=False)
    styles = run_styles(noise.measure.values.tolist())
    for measure, style in styles.items():
        line = {**style, "linewidth": 1, "capsize": 2, "label": plain(name_of(measure))}
        axes[3].plot(steps, noise.reliability.sel(measure=measure), **style, label=plain(name_of(measure)))
        if measure != reference:
            ours = agreement.sel(measure=measure, other=reference)
            whole, common = ours.sel(layer=WHOLE), overlap.sel(measure=measure, other=reference)
            axes[0].errorbar(steps, whole.rank_correlation, whole.standard_error, **line)
            axes[1].errorbar(steps, common.overlap, common.standard_error, **line)
            layers = ours.isel(event=0).drop_sel(layer=WHOLE)
            panels.draw_over_layers(layers.rank_correlation, ax=axes[2], **style)
    axes[1].axhline(_OVERLAP_SHARE, color="0.7", zorder=0)
    axes[1].set_ylim(bottom=-0.03 * axes[1].get_ylim()[1])  # so that a marker at 0 is whole
    with_other = [
        f"with {plain(name_of(reference))}, {which}"
        for which in ("all filters", f"the lowest {_OVERLAP_SHARE:.0%}", "in each layer")
    ]
    for ax, what_with_what in zip(axes, [*with_other, "with itself, on other batches"], strict=True):
        ax.set_title(what_with_what, fontsize=9)
        ax.set(ylabel="overlap" if ax is axes[1] else "rank correlation")
    for ax in (axes[0], axes[1], axes[3]):
        ax.set(xlabel="step", xticks=steps)
    for ax in axes:
        panels.say_where_empty(ax)
    headed(figure, what)
    legend_below(figure)
    return figure


def _compared_measures(runs: Runs) -> tuple[str, str, xr.Dataset, xr.Dataset, xr.Dataset, np.ndarray]:
    """Of the first run that has scores: title, reference measure, rank agreement, overlap, noise, and their steps."""
    name = comparing(runs)
    noise = analysis.score_noise(runs[name])
    measures = noise.measure.values.tolist()
    reference = "loss_preservation" if "loss_preservation" in measures else measures[0]
    overlap = analysis.removed_overlap(runs[name], share=_OVERLAP_SHARE)
    steps = columns(runs[name], "pruning", ["step"]).step.sel(event=noise.event).values
    return title(name, runs), reference, analysis.rank_agreement(runs[name]), overlap, noise, steps


def scale_invariance(runs: Runs) -> Figure:
    """In training mode, BatchNorm makes filters scale-invariant: the GraSP score of a filter is then minus its ‖g‖².

    The filters at the first event of the first run that has this study. Left: the cosine |θᵀg|/(‖θ‖‖g‖), in the
    network's order; 0 except for the ε of the normalisation. Right: −Σθ(Hg) as a multiple of ‖g‖², which is 1 on the
    grey line.
    """
    found = analysis.each(runs, analysis.scale_invariance)
    name = next(iter(found))
    alignment = found[name].alignment.isel(event=0)
    filters = columns(runs[name], "invariance", ["param_hess_grad", "grad_sqnorm"]).isel(event=0)
    multiple = -filters.param_hess_grad / filters.grad_sqnorm.where(filters.grad_sqnorm > 0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.9))
    for mode, style in MODES.items():
        left.plot(np.arange(filters.sizes["unit"]), alignment.sel(mode=mode), **style)
        right.plot(filters.grad_sqnorm.sel(mode=mode), multiple.sel(mode=mode), **style)
    right.axhline(1, color="0.7", linewidth=0.9, zorder=0)
    left.set(xlabel="filter", ylabel="|θᵀg| / (‖θ‖ ‖g‖)", yscale=_scale(alignment))
    right.set(xlabel=label_of("grad_sqnorm"), ylabel="−θᵀHg / ‖g‖²", xscale=_scale(filters.grad_sqnorm))
    right.set_yscale("symlog", linthresh=2)
    scales.fit_axis(right.yaxis, multiple.values)  # margins that were taken on the linear scale may vanish on this one
    for ax in (left, right):
        panels.say_where_empty(ax)
    headed(figure, title(name, runs))
    legend_below(figure)
    return figure


def _scale(values: xr.DataArray) -> str:
    """Set a logarithmic scale if any value is positive, which none is in a dead network."""
    return "log" if (values > 0).any() else "linear"
