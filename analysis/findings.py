"""Findings: a sentence each, computed from the given runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from dynamics.words import counted

from .agreement import ORDERS, agree
from .condition_names import names_of_conditions
from .conditions import MEASURES, comparisons, conditions, first_comparison, mean_by_measure, several_seeds
from .effect import effect_of_prunings, filters_left
from .loss import loss_decrease, stability
from .names import name_of
from .norm import layer_norm_rate, network_norm_rate
from .outcome import outcome
from .prunings import prunings
from .record import MissingQuantityError, columns, ended, has, layers
from .runs import Runs, check_runs, each
from .typeset import percent

NOT_FINITE = "no finite measurement has a finite prediction"


def diverged(runs: Runs) -> list[str]:
    """Which runs have a ‖θ‖² that is no longer finite, and from which step on."""
    said = []
    for label, run in runs.items():
        lost = [step + taken for name, taken in (("param_sqnorm", 0), ("update_sqnorm", 1))
                for step in _not_finite(run, name)]  # fmt: skip
        if lost:
            said.append(f"{label}: ‖θ‖² is not finite from step {min(lost)} on")
    return said


def _not_finite(run: xr.DataTree, name: str) -> list[int]:
    """The first step, if there is one, in whose row a squared norm is not finite."""
    if not has(run, "steps", name):
        return []
    total = columns(run, "steps", [name])[name].sum("layer", skipna=False)
    return total.step.values[~np.isfinite(total.values)][:1].tolist()


def loss_prediction(runs: Runs) -> str:
    """How well the loss decrease of a step is predicted, over all runs."""
    pooled = _pool(each(runs, loss_decrease))
    said = _errors(pooled)
    first, second = (np.abs(pooled.measured - pooled[order]).values for order in ORDERS)
    closer = (second < first)[np.isfinite(first) & np.isfinite(second)].mean()
    return (
        f"{said} The second order is closer in {percent(closer)} of the steps"
        f"{_ranks(agree(pooled).rank_correlation[1:])}."
    )


def loss_over_time(runs: Runs) -> str:
    """How the error of the prediction changes from the first half of the training to the second."""
    halves: dict[str, list[xr.Dataset]] = {"first": [], "second": []}
    for prediction in each(runs, loss_decrease).values():
        middle = prediction.sizes["step"] // 2
        halves["first"].append(prediction.isel(step=slice(middle)))
        halves["second"].append(prediction.isel(step=slice(middle, None)))
    if not any(part.sizes["step"] for part in halves["first"]):
        raise MissingQuantityError("only one step was measured: a first and a second half need two")
    errors = {half: agree(_pool(dict(enumerate(parts)))).median_relative_error for half, parts in halves.items()}
    if not any(np.isfinite(of).any() for of in errors.values()):
        raise MissingQuantityError(NOT_FINITE)
    (early_first, early), (late_first, late) = (map(error_in_percent, errors[half].values) for half in halves)
    smaller = ", with smaller steps" * _learning_rate_fell(runs)
    return (
        f"Median relative error in the first half of the training: {early_first} in first and {early} in "
        f"second order; in the second half{smaller}: {late_first} and {late}."
    )


def norm_prediction(runs: Runs) -> str:
    """How well the velocity of the norm is predicted, over all runs."""
    found = each(runs, network_norm_rate)
    momentum = any(_has_momentum(runs[label]) for label in found)
    return _errors(_pool(found)) + " The prediction leaves out momentum." * momentum


def in_layers(runs: Runs) -> str:
    """Label of the first run that was recorded layer by layer, preferably a pruned one.

    Raises:
        MissingQuantityError: there is none. ValueError: the runs are not given by label.
    """
    check_runs(runs)
    several = [label for label, run in runs.items() if {*layers(run)} - {"network"}]
    if not several:
        raise MissingQuantityError(
            "no quantity per layer in the record: record /steps or /curvature (condensed records keep few layers)"
        )
    return next((label for label in several if len(prunings(runs[label]))), several[0])


def layer_spread(runs: Runs) -> str:
    """How far the layers' gradients differ, at steps at which each has one, and which layer moves the norm most."""
    run = runs[in_layers(runs)]
    gradients = columns(run, "steps", ["grad_sqnorm"]).grad_sqnorm
    typical = gradients.where(gradients > 0).median("step")
    typical = typical[np.isfinite(typical)]
    if typical.size < 2:
        raise MissingQuantityError("fewer than two layers have a gradient that is finite and not zero")
    said = f"The layers' median ‖g‖² differ by up to a factor of {_rounded(float(typical.max() / typical.min()))}."
    try:
        rate = abs(layer_norm_rate(run)).sum("step")
    except MissingQuantityError:
        return said
    if not 0 < rate.sum() < np.inf:
        return said
    share = float(rate.max() / rate.sum())
    return f"{said} {share:.1%} of all measured |d‖θ‖²/dt| is in layer {rate.idxmax('layer').item()}."


def final_accuracy(runs: Runs) -> str:
    """Final accuracies, and what pruning cost: means of each measure, over seeds and conditions."""
    check_runs(runs)
    found = {label: outcome(run) for label, run in runs.items() if ended(run)}
    if not found:
        raise MissingQuantityError("no run has ended: accuracies are final only after the last epoch of the experiment")
    last = mean_by_measure(runs, {label: float(values.test_accuracy) for label, values in found.items()})
    if last.empty:
        raise MissingQuantityError("no measure has a known accuracy under all conditions that are compared")
    measure = conditions(runs).measure
    gone = {measure[label] for label, values in found.items() if values.sparsity > 0 or values.removed_parameters > 0}
    mean = ", means over conditions and seeds" * (len(found) > len(last))
    pruned, whole = last[last.index.isin(gone)], last[~last.index.isin(gone)]
    if pruned.empty:
        return f"Final test accuracy{mean}: {_from_to(whole)}."
    said = f"Final test accuracy of the pruned networks{mean}: {_from_to(pruned)}"
    without = f"; without pruning {_from_to(whole)}" if len(whole) else ""
    alone = " One seed each, so no verdict on which is better." * (not several_seeds(runs))
    return f"{said}{without}.{alone}"


def layer_choice(runs: Runs) -> str:
    """Where the measures disagree most about which layer to prune, under the first condition, means over seeds."""
    first = first_comparison(runs)
    condition = names_of_conditions(comparisons(runs))[first.index[0]]
    where = f"{condition}: " if condition else ""
    found = each({label: runs[label] for label in first.run}, filters_left)
    shares = {
        measure: xr.concat([found[label].share.isel(event=-1) for label in labels], "seed", join="outer").mean("seed")
        for measure, labels in first[first.run.isin(found)].groupby("measure", sort=False).run
    }
    if len(shares) < 2:
        (share,) = shares.values()
        layer = share.idxmin("layer").item()
        return f"{where}layer {layer} keeps the smallest share of its filters, {percent(share.min())}."
    left = xr.concat(list(shares.values()), xr.Variable("measure", list(shares)), join="outer")
    layer = (left.max("measure") - left.min("measure")).idxmax("layer").item()
    there = left.sel(layer=layer)
    low, high = there.idxmin("measure").item(), there.idxmax("measure").item()
    compared = "measures" if set(shares) <= {*MEASURES} else "networks"
    if there.min() == there.max():
        return f"{where}the {compared} leave the same share of the filters in every layer."
    return (
        f"{where}the {compared} differ most in layer {layer}, where {name_of(low)} leaves "
        f"{percent(there.min())} of the filters and {name_of(high)} {percent(there.max())}."
    )


def effect_prediction(runs: Runs) -> str:
    """How well the effect of a pruning is predicted, over all runs."""
    effects = each(runs, effect_of_prunings)
    pooled = {name: _pool({label: effect.sel(quantity=name) for label, effect in effects.items()})
              for name in ("loss", "grad_sqnorm", "param_sqnorm_rate")}  # fmt: skip
    if not any(values.sizes["pair"] for values in pooled.values()):
        raise MissingQuantityError(NOT_FINITE)
    loss, norm, rate = (agree(values) for values in pooled.values())
    first, second = loss.median_relative_error.values
    removed = max((values.removed_share for values in pooled.values()), key=np.size)
    low, high = (f"{100 * float(share):.0f}" for share in (removed.min(), removed.max()))
    share = f"{low} to " * (low != high) + high
    extent = f", {'each ' * (removed.size != 1)}removing {share}% of the remaining parameters"
    event = "pruning" if any(len(prunings(run)) for run in runs.values()) else "event"
    return (
        f"Loss: median relative error {percent(first)} in first and {percent(second)} in second order"
        f"{_ranks(loss.rank_correlation)}. ‖g‖², first order: {percent(norm.median_relative_error[0])}"
        f"{_ranks(norm.rank_correlation[:1])}. d‖θ‖²/dt, first order: {percent(rate.median_relative_error[0])}"
        f"{_ranks(rate.rank_correlation[:1])}. n = {counted(removed.size, event)}"
        f"{extent * (event == 'pruning')}."
    )


def time_unstable(runs: Runs) -> str:
    """The share of measured steps beyond the stability limit, and the share of these that lowered the loss."""
    found = each(runs, stability)
    ratios = np.concatenate([of.stability.values for of in found.values()])
    ratios = ratios[np.isfinite(ratios)]
    share, middle = (ratios > 2).mean(), np.median(ratios)
    said = f"The ratio has a median of {middle:.2g} and exceeds 2 in {percent(share)} of the measured steps"
    lowered = np.concatenate([_decreases(runs[label], of.step[of.stability > 2]) for label, of in found.items()]) > 0
    also = f"; {percent(lowered.mean())} of these lowered the loss on their own batch" if lowered.size else ""
    return f"{said}{also}."


def _decreases(run: xr.DataTree, steps: xr.DataArray) -> np.ndarray:
    """By how much these steps lowered the loss on their own batch, where that was measured."""
    try:
        return loss_decrease(run).measured.reindex(step=steps).dropna("step").values
    except MissingQuantityError:
        return np.empty(0)


def _has_momentum(run: xr.DataTree) -> bool:
    """Whether some step's flow time differs from its learning rate, which only momentum causes."""
    if not has(run, "steps", "flow_step", "learning_rate"):
        return False
    steps = columns(run, "steps", ["flow_step", "learning_rate"])
    return not np.allclose(steps.flow_step, steps.learning_rate, rtol=1e-6, atol=0, equal_nan=True)


def _learning_rate_fell(runs: Runs) -> bool:
    """Whether the learning rate fell in every run, that is, its mean is lower in the second half of the training."""
    rates = [columns(run, "steps", ["learning_rate"]).learning_rate.max("layer") for run in runs.values()
             if has(run, "steps", "learning_rate")]  # fmt: skip
    halves = [(rate[: rate.size // 2], rate[rate.size // 2 :]) for rate in rates if rate.size > 1]
    return bool(halves) and all(float(late.mean()) < 0.999 * float(early.mean()) for early, late in halves)


def _pool(predictions: Mapping[Any, xr.Dataset]) -> xr.Dataset:
    """All runs' pairs of measured and predicted over one dim."""
    flat = [
        found.drop_vars([name for name in found.coords if name != "removed_share"]) for found in predictions.values()
    ]
    return xr.concat([found.rename(dict.fromkeys(found.dims, "pair")) for found in flat], "pair").dropna(
        "pair", subset=["measured"]
    )


def _ranks(correlations: xr.DataArray) -> str:
    """The rank correlations, in brackets; "" if there are too few points for any."""
    known = [f"{value:.2f}" for value in correlations.values if np.isfinite(value)]
    return f" (rank correlation {' and '.join(known)})" if known else ""


def _errors(pooled: xr.Dataset) -> str:
    agreed = agree(pooled)
    count = int(agreed["count"].max())
    if not count:
        raise MissingQuantityError(NOT_FINITE)
    if not (pooled.measured != 0).any():
        raise MissingQuantityError("everything measured is zero: relative errors need a network that changes")
    first, second = map(error_in_percent, agreed.median_relative_error.values)
    return f"Median relative error over {counted(count, 'point')}: {first} in first order, {second} in second order."


def error_in_percent(share: float) -> str:
    """A share in per cent, with at least one digit other than 0 down to 0.001%."""
    if not np.isfinite(share):
        return "not finite"
    if 0 < share < 1e-5:
        return "under 0.001%"
    if share >= 10:
        return f"{_spaced(float(f'{100 * share:.2g}'))}%"
    return f"{share:.1%}" if share == 0 or share >= 0.0005 else f"{100 * share:.1g}%"


def _from_to(values: pd.Series) -> str:
    """The lowest and the highest of the values, as percentages with their names."""
    worst, best = values.idxmin(), values.idxmax()
    if len(values) == 1:
        return f"{values[best]:.1%}" + f" ({name_of(best)})" * (best != "none")
    return f"{values[worst]:.1%} ({name_of(worst)}) to {values[best]:.1%} ({name_of(best)})"


def _rounded(value: float) -> str:
    return _spaced(float(f"{value:.1g}")) if value >= 9.5 else f"{value:.2g}"


def _spaced(value: float) -> str:
    """A whole number with spaces between thousands."""
    return f"{value:,.0f}".replace(",", " ")
