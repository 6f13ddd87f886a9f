"""What was found, in a sentence each, computed from the runs at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from .agreement import ORDERS, agree
from .conditions import by_condition, conditions, first_comparison, mean_by_measure, several_seeds
from .effect import filters_left, pruning_effect
from .loss import loss_decrease, stability
from .names import name_of
from .norm import layer_norm_rate, network_norm_rate
from .outcome import outcome
from .prunings import prunings
from .record import MissingQuantityError, columns, ended, has, node

Runs = Mapping[str, xr.DataTree]


def each(runs: Runs, analyse: Callable[[xr.DataTree], xr.Dataset]) -> dict[str, xr.Dataset]:
    """The analysis of every run that recorded what it needs.

    Raises:
        MissingQuantityError: none of the runs did.
    """
    found, missing = {}, MissingQuantityError("no runs given")
    for label, run in runs.items():
        try:
            found[label] = analyse(run)
        except MissingQuantityError as error:
            missing = error
    if not found:
        raise missing
    return found


def diverged(runs: Runs) -> list[str]:
    """Which runs have parameters that are not finite any more, and from which step on."""
    said = []
    for label, run in runs.items():
        names = [name for name in ("param_sqnorm", "update_sqnorm") if has(run, "steps") and name in run["steps"]]
        total = columns(run, "steps", names).sum("layer", skipna=False) if names else None
        lost = [] if total is None else np.flatnonzero(~np.isfinite(total.to_array()).all("variable"))
        if len(lost):
            said.append(f"{label}: parameters are not finite from step {int(total.step[lost[0]])} on")
    return said


def loss_prediction(runs: Runs) -> str:
    """How well the loss decrease of a step is predicted, over all runs."""
    pooled = _pool(each(runs, loss_decrease))
    errors = [np.abs(pooled.measured - pooled[order]) for order in ORDERS]
    closer = float((errors[1] < errors[0]).mean())
    return (
        f"{_errors(pooled)} The second order is the closer one in {closer:.0%} of the "
        f"steps{_ranks(agree(pooled).rank_correlation[1:])}."
    )


def loss_over_time(runs: Runs) -> str:
    """How the error of the prediction changes from the first half of the training to the second."""
    halves = {"first": [], "second": []}
    for prediction in each(runs, loss_decrease).values():
        middle = prediction.sizes["step"] // 2
        halves["first"].append(prediction.isel(step=slice(middle)))
        halves["second"].append(prediction.isel(step=slice(middle, None)))
    errors = {half: agree(_pool(dict(enumerate(parts)))).median_relative_error for half, parts in halves.items()}
    (early_first, early), (late_first, late) = (map(float, errors[half]) for half in halves)
    return (
        f"Median relative error in the first half of the training: {early_first:.1%} in first and {early:.1%} in "
        f"second order; in the second half{', at smaller steps' * _slower(runs)}: {late_first:.1%} and {late:.1%}."
    )


def norm_prediction(runs: Runs) -> str:
    """How well the velocity of the norm is predicted, over all runs."""
    found = each(runs, network_norm_rate)
    momentum = any(_has_momentum(runs[label]) for label in found)
    return _errors(_pool(found)) + " What is left out is the momentum." * momentum


def in_layers(runs: Runs) -> str:
    """Label of the first run that was recorded layer by layer, of a pruned one if there is such.

    Raises:
        MissingQuantityError: there is none.
    """
    several = [label for label, run in runs.items() if _layers(run) - {"network"}]
    if not several:
        raise MissingQuantityError(
            "no quantity per layer in the record: record /steps or /curvature; condensed records keep some runs' only"
        )
    return next((label for label in several if len(prunings(runs[label]))), several[0])


def _layers(run: xr.DataTree) -> set[str]:
    nodes = (run[name] for name in ("steps", "curvature") if name in run.children)
    return {str(layer) for of in nodes if "layer" in of.coords for layer in of.layer.values}


def layer_spread(runs: Runs) -> str:
    """How far apart the layers are in gradient, and which of them moves the norm."""
    run = runs[in_layers(runs)]
    steps = node(run, "steps", ["grad_sqnorm"])
    typical = steps.grad_sqnorm.median("step")
    factor = float(typical.max() / typical[typical > 0].min())
    said = f"The layers' median ‖g‖² lie a factor {_rounded(factor)} apart."
    try:
        rate = np.abs(layer_norm_rate(run)).sum("step")
    except MissingQuantityError:
        return said
    most, share = str(rate.layer.values[np.argmax(rate.values)]), float(rate.max() / rate.sum())
    return f"{said} {share:.1%} of all |d‖θ‖²/dt|, as measured, is in layer {most}."


def final_accuracy(runs: Runs) -> str:
    """Final accuracies, and how far pruning cost any: means of each measure, over seeds and conditions."""
    found = {label: outcome(run) for label, run in runs.items() if ended(run)}
    if not found:
        raise MissingQuantityError("no run ended: an accuracy is final after the last epoch of the experiment")
    last = mean_by_measure(runs, {label: float(values.test_accuracy) for label, values in found.items()})
    measure = conditions(runs).measure
    gone = {measure[label] for label, values in found.items() if max(values.sparsity, values.removed_parameters) > 0}
    whole = ", ".join(f"{last[name]:.1%} without pruning" for name in last.index if name not in gone)
    mean = ", means over conditions and seeds" * (len(found) > len(last))
    pruned = last[last.index.isin(gone)]
    if pruned.empty:
        return f"Final test accuracy{mean}: {whole}."
    best, worst = pruned.idxmax(), pruned.idxmin()
    spread = f"{last[worst]:.1%} ({name_of(worst)}) to {last[best]:.1%} ({name_of(best)})"
    spread = spread if best != worst else f"{last[best]:.1%} ({name_of(best)})"
    said = f"Final test accuracy of the pruned networks{mean}: {spread}"
    return said + (f"; {whole}." if whole else ".") + _seeds(runs)


def layer_choice(runs: Runs) -> str:
    """Where the measures disagree most about which layer to prune, under the first condition, means over seeds."""
    first = first_comparison(runs)
    (condition,) = by_condition(first)
    where = f"{condition}: " if condition else ""
    found = each({label: runs[label] for label in first.run}, filters_left)
    shares = {
        measure: xr.concat([found[label].share.isel(event=-1) for label in labels], "seed", join="outer").mean("seed")
        for measure, labels in first[first.run.isin(found)].groupby("measure", sort=False).run
    }
    if len(shares) < 2:
        (share,) = shares.values()
        least = share.layer.values[np.argmin(share.values)]
        return f"{where}layer {least} keeps the least, {float(share.min()):.0%}."
    left = xr.concat(list(shares.values()), xr.Variable("measure", list(shares)), join="outer")
    spread = left.max("measure") - left.min("measure")
    layer = spread.layer.values[np.argmax(spread.values)]
    there = left.sel(layer=layer)
    low, high = there.measure.values[np.argmin(there.values)], there.measure.values[np.argmax(there.values)]
    return (
        f"{where}the measures differ most in layer {layer}, where {name_of(low)} leaves "
        f"{float(there.min()):.0%} of the filters and {name_of(high)} {float(there.max()):.0%}."
    )


def effect_prediction(runs: Runs) -> str:
    """How well the effect of a pruning is predicted, over all runs."""
    pooled = {name: _pool({label: effect.sel(quantity=name) for label, effect in each(runs, pruning_effect).items()})
              for name in ("loss", "grad_sqnorm", "param_sqnorm_rate")}  # fmt: skip
    loss, norm, rate = (agree(values) for values in pooled.values())
    first, second = loss.median_relative_error.values
    removed = pooled["loss"].removed_share
    return (
        f"Loss: median relative error {first:.0%} in first and {second:.0%} in second order"
        f"{_ranks(loss.rank_correlation)}. ‖g‖²: {float(norm.median_relative_error[0]):.0%}"
        f"{_ranks(norm.rank_correlation[:1])}. d‖θ‖²/dt: {float(rate.median_relative_error[0]):.0%}"
        f"{_ranks(rate.rank_correlation[:1])}. n = {removed.size} prunings, each of "
        f"{float(removed.min()):.0%} to {float(removed.max()):.0%} of the parameters left."
    )


def time_unstable(runs: Runs) -> str:
    """Share of measured steps beyond the stability limit, and of those the share that lowered the loss."""
    found = each(runs, stability)
    ratios = np.concatenate([of.stability.dropna("step").values for of in found.values()])
    share, middle = (ratios > 2).mean(), np.median(ratios)
    said = f"The ratio is above 2 in {share:.0%} of the measured steps; its median is {middle:.2g}."
    lowered = np.concatenate([_decreases(runs[label], of.step[of.stability > 2]) for label, of in found.items()]) > 0
    return f"{said} {lowered.mean():.0%} of those steps lowered the loss on their own batch." if lowered.size else said


def _decreases(run: xr.DataTree, steps: xr.DataArray) -> np.ndarray:
    """By how much these steps lowered the loss on their own batch, as far as that was measured."""
    try:
        return loss_decrease(run).measured.reindex(step=steps).dropna("step").values
    except MissingQuantityError:
        return np.empty(0)


def _has_momentum(run: xr.DataTree) -> bool:
    """Whether some step's flow time differs from its learning rate, as it does with momentum alone."""
    if not has(run, "steps") or not {"flow_step", "learning_rate"} <= set(run["steps"].data_vars):
        return False
    steps = columns(run, "steps", ["flow_step", "learning_rate"])
    return not np.allclose(steps.flow_step, steps.learning_rate, rtol=1e-6, atol=0, equal_nan=True)


def _slower(runs: Runs) -> bool:
    """Whether the learning rate fell in every run: in the mean it is lower in the second half of the training."""
    rates = [columns(run, "steps", ["learning_rate"]).learning_rate.max("layer") for run in runs.values()
             if has(run, "steps") and "learning_rate" in run["steps"]]  # fmt: skip
    halves = [(rate[: rate.size // 2], rate[rate.size // 2 :]) for rate in rates if rate.size > 1]
    return bool(halves) and all(float(late.mean()) < 0.999 * float(early.mean()) for early, late in halves)


def _pool(predictions: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """All runs' pairs of measured and predicted over one dim."""
    flat = [
        found.drop_vars([name for name in found.coords if name != "removed_share"]) for found in predictions.values()
    ]
    return xr.concat([found.rename(dict.fromkeys(found.dims, "pair")) for found in flat], "pair").dropna(
        "pair", subset=["measured"]
    )


def _ranks(correlations: xr.DataArray) -> str:
    """The rank correlations, in a half-sentence; nothing where there are too few points for one."""
    known = [f"{value:.2f}" for value in correlations.values if np.isfinite(value)]
    return f", rank correlation {' and '.join(known)}" if known else ""


def _errors(pooled: xr.Dataset) -> str:
    first, second = (float(value) for value in agree(pooled).median_relative_error)
    points = f"Median relative error over {pooled.sizes['pair']} points"
    return f"{points}: {first:.1%} in first order, {second:.1%} in second order."


def _seeds(runs: Runs) -> str:
    return "" if several_seeds(runs) else " One seed each: no verdict about the measures."


def _rounded(value: float) -> str:
    return f"{float(f'{value:.1g}'):,.0f}".replace(",", " ")
