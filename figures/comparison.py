"""Figures of measures side by side, over seeds: runs in, figure out. Each docstring opens with the claim it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import analysis
from analysis import MissingQuantityError, comparison, effect
from analysis.names import name_of
from analysis.norm import network_norm
from analysis.prunings import in_epochs, in_steps
from analysis.runs import Runs
from dynamics.schema import label as label_of

from . import panels, scales
from .labels import wrapped
from .layout import by_measure, events_of, grid, legend_below, models, named, rows_of, share_bar
from .style import named_styles


def accuracy(runs: Runs) -> Figure:
    """Which measure gives the best network depends on model, data and rounds; measures often differ less than seeds.

    Final test accuracy, one panel per condition. Small markers: single seeds; large: their mean with its 95% interval
    (Student's), which may extend beyond the panel. Grey line: the mean of the networks that were not pruned.
    """
    found = comparison.compare(runs, comparison.final)
    if _is_one_run(found):
        raise MissingQuantityError("one run alone has nothing to be compared with; training_curves draws its accuracy")
    every = dict.fromkeys(measure for measures in found.values() for measure in measures)  # rows that panels share
    figure, axes = grid(len(found), width=4.1, height=max(1.9, _height([every])), columns=2, sharex=False, sharey=True)
    styles = named_styles(every)
    for ax, (condition, measures) in zip(axes, found.items(), strict=True):
        panels.draw_seeds({measure: values.test_accuracy for measure, values in measures.items()}, styles, ax=ax)
        if "none" in measures:
            ax.axvline(float(measures["none"].test_accuracy.mean()), color="0.7", linewidth=0.9, zorder=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        scales.percent(ax.xaxis)
        named(ax, condition)
    figure.supxlabel("test accuracy", fontsize=9)
    return figure


def convergence(runs: Runs) -> Figure:
    """How fast the networks left by each measure train on after the last pruning.

    One row per condition. Left: training loss after the last pruning, as a moving average over one epoch, over at least
    half an epoch at either end; median over seeds, with a band between the quartiles. Middle: the mean training loss of
    these steps, the area under the curve, of runs that took as many of them as most pruned ones of the condition.
    Right: steps until the mean loss of an epoch, hence at least one epoch, falls to the given share of the first loss:
    the smallest share that all runs of the condition reached or, if there is none, 75%, with the runs that reached it,
    and a mean where all of a measure did. Not drawn where all runs took the same number. Small markers: single seeds;
    large: their mean with its 95% interval (Student's).
    """
    found = comparison.compare_convergence(runs)
    alone = _is_one_run(found)
    figure, rows = rows_of(len(found), 1 if alone else 3, width=3.6, height=max(2.3, _height(found.values())))
    for axes, (condition, measures) in zip(rows, found.items(), strict=True):
        _draw_medians(axes[0], measures, "loss")
        axes[0].set(ylabel="training loss  [L]")
        named(axes[0], condition, panels=len(axes))
        if alone:
            continue
        share, steps = _reached(measures)
        _draw_areas(measures, ax=axes[1])
        panels.draw_seeds(steps, named_styles(measures), ax=axes[2])
        axes[2].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[2].set(xlabel=f"steps to {share:.0%} of the first loss", yticklabels=[])
        known = np.concatenate([reached.dropna("seed") for reached in steps.values()])
        axes[2].set_visible(len(np.unique(known)) > 1)
    legend_below(figure)
    return figure


def norms(runs: Runs) -> Figure:
    """A pruning removes its share of ‖θ‖²; from then on the norm of what is left follows the same law.

    One row per condition: ‖θ‖² of the whole network over training and, where the optimizer follows the gradient, its
    measured velocity in flow time, averaged over windows of steps that end at events; median over seeds, with a band
    between the quartiles, which may extend beyond the panel.
    """
    found, events = comparison.compare(runs, network_norm), events_of(runs, in_steps)
    moving = any("param_sqnorm_rate" in values for measures in found.values() for values in measures.values())
    figure, rows = rows_of(len(found), 1 + moving, width=3.9, height=2.2)
    for axes, (condition, measures) in zip(rows, found.items(), strict=True):
        for ax, quantity in zip(axes, ("param_sqnorm", "param_sqnorm_rate"), strict=False):
            _draw_medians(ax, measures, quantity)
            panels.draw_events(*events[condition], ax=ax)
            ax.set(ylabel=label_of(quantity))
            ax.set_visible(any(quantity in values for values in measures.values()))
        named(axes[0], condition, panels=len(axes))
    legend_below(figure)
    return figure


def training_curves(runs: Runs) -> Figure:
    """What a pruning costs in loss and accuracy, and how much of it further training recovers.

    One row per condition: training loss and test accuracy after each epoch, in experiments before any pruning at its
    end; test loss where no accuracy was logged. Median over seeds, with a band between the quartiles, which may extend
    beyond the panel. Each pruning is marked after the steps that precede it.
    """
    found, events = comparison.compare(runs, analysis.training_curve), events_of(runs, in_epochs)
    figure, rows = rows_of(len(found), 2, width=3.7, height=2.5)
    for axes, (condition, measures) in zip(rows, found.items(), strict=True):
        accurate = any("test_accuracy" in values for values in measures.values())
        tested = "test_accuracy" if accurate else "test_loss"
        for ax, quantity in zip(axes, ("train_loss", tested), strict=True):
            _draw_medians(ax, measures, quantity)
            panels.draw_times(*events[condition], ax=ax)
            ax.set(ylabel=label_of(quantity))
            ax.set_visible(any(quantity in values for values in measures.values()))
        if accurate:
            scales.percent(axes[1].yaxis)
        named(axes[0], condition, panels=len(axes))
    legend_below(figure)
    return figure


def filters_left(runs: Runs) -> Figure:
    """Which layers each measure takes its filters from, at the same sparsity.

    Share of each layer's filters that is left after the last pruning, one panel per condition. Mean over seeds with its
    95% interval (Student's); with too many layers for points, the mean as a colour.
    """
    found = comparison.compare(runs, lambda run: analysis.filters_left(run).isel(event=-1, drop=True))
    layers = {name: max(values.sizes["layer"] for values in measures.values()) for name, measures in found.items()}
    many = [name for name, count in layers.items() if count > panels.MANY_LAYERS]
    figure, axes = grid(len(found), width=9.6 if many else 7.2, height=2.7, columns=1, sharex=False)
    mapped = []
    for ax, (condition, measures) in zip(axes, found.items(), strict=True):
        styles = named_styles(measures)
        if condition in many:
            means = {
                style["label"]: measures[measure].share.mean("seed", skipna=False) for measure, style in styles.items()
            }
            panels.draw_layer_map(means, ax=ax)
            mapped.append(ax)
        else:
            for (measure, style), beside in zip(styles.items(), _beside(len(measures)), strict=True):
                share = comparison.mean_and_interval(measures[measure].share)
                panels.draw_over_layers(share["mean"], ax=ax, beside=beside, alpha=0.9, **style | {"markersize": 3.5})
                panels.draw_layer_bars(share, ax=ax, beside=beside, color=style["color"])
            ax.set(ylim=(-0.03, 1.04), ylabel="share of filters left")
            scales.percent(ax.yaxis)
        named(ax, condition)
    if mapped:
        share_bar(figure, mapped, "share of filters left")
    legend_below(figure)
    return figure


def stability(runs: Runs) -> Figure:
    """Where Δt gᵀHg/‖g‖² exceeds 2, the quadratic model predicts that a step of that flow time raises the loss.

    The ratio at each measured step, one panel per condition: median over seeds, with a band between the quartiles,
    which may extend beyond the panel. The line marks 2. With momentum, a step's flow time is η/(1−β), but the step
    itself is shorter, because it carries earlier gradients.
    """
    found, events = comparison.compare(runs, analysis.stability), events_of(runs, in_steps)
    figure, axes = grid(len(found), width=7.2 if len(found) == 1 else 3.9, height=2.8, columns=2, sharex=False)
    for ax, (condition, measures) in zip(axes, found.items(), strict=True):
        _draw_medians(ax, measures, "stability", [2])
        ax.axhline(2, color="0.3", linewidth=1)
        panels.draw_events(*events[condition], ax=ax)
        ax.set(ylabel="Δt gᵀHg/‖g‖²")
        named(ax, condition)
    legend_below(figure)
    return figure


def loss_and_gradient_at_pruning(runs: Runs) -> Figure:
    """What a pruning does to the loss and the gradient norm depends on the measure and on how much it removes.

    Loss (top) and ‖g‖² (bottom) right after each pruning divided by those right before it, at its probe, against the
    share of the remaining parameters that it removed; one column per model and data set. On the grey line, nothing
    changed. ‖g‖² after the pruning is that of the parameters that stay.
    """
    found = analysis.each(runs, effect.loss_and_gradient_at_pruning)
    groups = models(runs, found)
    figure, rows = rows_of(2, len(groups), width=3.4, height=2.7, least=5.4)
    for column, (name, labels) in enumerate(groups.items()):
        for axes, quantity in zip(rows, ("loss", "grad_sqnorm"), strict=True):
            ax = axes[column]
            for label, style in by_measure(runs, labels).items():
                ax.plot(found[label].removed_share, found[label][quantity], linestyle="none", alpha=0.8, **style)
            panels.say_where_empty(ax)
            ax.axhline(1, color="0.7", linewidth=0.9, zorder=0)
            scales.scale_axis(ax.yaxis, np.concatenate([line.get_ydata() for line in ax.lines]))
            scales.percent(ax.xaxis)
        rows[1][column].set(xlabel="share of the parameters removed")
        named(rows[0][column], name)
    rows[0][0].set(ylabel="loss after / before")
    rows[1][0].set(ylabel="‖g‖² after / before")
    legend_below(figure)
    return figure


def _draw_medians(ax: Axes, measures: comparison.ByMeasure, quantity: str, marks: Sequence[float] = ()) -> None:
    """Draw each measure's median over seeds, if it has one, with the band of quartiles, which may leave the axis.

    The axis is fitted to the medians, and to ``marks``.
    """
    for measure, style in named_styles(measures).items():
        if quantity in measures[measure]:
            panels.draw_median(comparison.median_and_quartiles(measures[measure][quantity]), ax=ax, **style)
    panels.say_where_empty(ax)
    medians = np.concatenate([line.get_ydata() for line in ax.lines] or [[]])
    shown = np.concatenate([medians, marks])
    if quantity != "test_accuracy" and np.any(medians != 0):
        scales.scale_axis(ax.yaxis, shown)
    scales.fit_axis(ax.yaxis, shown)


def _draw_areas(measures: comparison.ByMeasure, *, ax: Axes) -> None:
    """Draw the areas over as many steps as most pruned runs of the condition took, or say that there are none."""
    areas = {measure: values.area[values.comparable.values] for measure, values in measures.items()}
    panels.draw_seeds(areas, named_styles(measures), ax=ax)
    ax.set(xlabel="mean training loss  [L]")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if not any(of_seeds.size for of_seeds in areas.values()):
        panels.say("not compared: these runs trained\nfor different numbers of steps", ax=ax)
        ax.set_xticks([])


def _is_one_run(found: Mapping[str, comparison.ByMeasure]) -> bool:
    return sum(values.sizes["seed"] for measures in found.values() for values in measures.values()) < 2


def _height(panels: Iterable[Iterable[str]]) -> float:
    """Inches of panels with one row per measure, each as high as the lines of its name."""
    lines = (sum(1 + wrapped(name_of(measure)).count("\n") for measure in measures) for measures in panels)
    return 0.7 + 0.16 * max(lines)


def _beside(count: int) -> np.ndarray:
    """Offsets from a layer's place for the points of several measures."""
    return np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(1)


def _reached(measures: comparison.ByMeasure) -> tuple[float, dict[str, xr.DataArray]]:
    """Steps to the smallest share of the first loss that all runs reached; if there is none, to the largest share."""
    shares = next(iter(measures.values())).share.values
    finite = [
        share for share in shares if all(np.isfinite(v.steps_to_loss.sel(share=share)).all() for v in measures.values())
    ]
    share = min(finite, default=max(shares))
    chosen = {measure: values.steps_to_loss.sel(share=share) for measure, values in measures.items()}
    return share, {measure: steps.where(np.isfinite(steps)) for measure, steps in chosen.items()}
