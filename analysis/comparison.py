"""Runs side by side: analyses by condition and measure, over seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import xarray as xr

from .condition_names import by_condition, names_of_conditions
from .conditions import comparisons, conditions, first_comparison
from .convergence import convergence, equally_long, last_pruning
from .given import check_array
from .intervals import half_width
from .logged_losses import epoch_means
from .names import name_of
from .outcome import outcome
from .record import MissingQuantityError, ended
from .runs import Runs, each

ByMeasure = dict[str, xr.Dataset]


def compare(runs: Runs, analyse: Callable[[xr.DataTree], xr.Dataset]) -> dict[str, ByMeasure]:
    """An analysis of all runs: by condition, then by measure, over the new first dim ``seed``.

    Conditions are those of :func:`analysis.comparisons`, by their printed names. Runs that lack what the analysis needs
    are left out; an index value that some runs lack is kept, with NaN for these.

    Raises:
        MissingQuantityError: all runs lack what it needs.
    """
    return _compared(runs, {name: (rows, analyse) for name, rows in by_condition(comparisons(runs)).items()})


def compare_convergence(runs: Runs) -> dict[str, ByMeasure]:
    """:func:`compare` of :func:`analysis.convergence` in runs that ended, from the condition's last pruning on.

    It adds ``loss`` over ``step`` from there on: a moving average of the logged loss over as many steps as an epoch
    has, or, at both ends, over those that exist, which are at least half as many; and ``comparable``, over ``seed``:
    whether the run took as many steps from there on as most pruned ones of its condition, or as most if none was
    pruned, without which its area says nothing.

    Raises:
        MissingQuantityError: no run that ended logged its loss.
    """
    jobs = {}
    for name, rows in by_condition(comparisons(runs)).items():
        since = max(last_pruning(runs[label]) for label in rows.run)
        jobs[name] = rows, partial(_training_after, since=since)
    found = _compared(runs, jobs)
    for measures in found.values():
        steps = pd.concat({measure: values.steps.to_series() for measure, values in measures.items()})
        even = equally_long(steps, pruned=steps.index.get_level_values(0) != "none")
        measures |= {
            measure: values.assign(comparable=("seed", even[measure].to_numpy()))
            for measure, values in measures.items()
        }
    return found


def final(run: xr.DataTree) -> xr.Dataset:
    """:func:`analysis.outcome` of a run that ended.

    Raises:
        MissingQuantityError: the run did not end, or logged no accuracy.
    """
    found = outcome(run)
    if not ended(run) or np.isnan(found.test_accuracy):
        raise MissingQuantityError("no run has ended with a test accuracy: call recorder.log_epoch(test_accuracy=...)")
    return found


def mean_and_interval(values: xr.DataArray) -> xr.Dataset:
    """``mean`` over ``seed``, and the bounds ``low`` and ``high`` of its 95% interval, NaN for one seed.

    If a seed's value is NaN, so is the mean: without its diverged seeds it would be the mean of something else. The
    interval is Student's: :func:`analysis.intervals.half_width`.

    Raises:
        ValueError: ``values`` is no array over ``seed``.
    """
    check_array(values, "seed")
    mean = values.mean("seed", skipna=False)
    half = mean.copy(data=half_width(values.transpose("seed", ...).values, axis=0))
    return xr.Dataset({"mean": mean, "low": mean - half, "high": mean + half})


def median_and_quartiles(values: xr.DataArray) -> xr.Dataset:
    """``median`` over ``seed``, the quartiles ``low`` and ``high``, and the number of ``seeds`` that are finite there.

    For quantities in which a single seed can be an outlier: a mean would follow it, and an interval or a range would
    hide all others. A seed that ended before the others, or diverged, is left out from there on, and ``seeds`` falls.
    Between two seeds, quartiles are interpolated.

    Raises:
        ValueError: ``values`` is no array over ``seed``.
    """
    check_array(values, "seed")
    known = values.where(np.isfinite(values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # NaN is right where no seed has a value
        quartiles = known.quantile([0.25, 0.5, 0.75], "seed", skipna=bool(known.isnull().any()))
    low, median, high = quartiles.drop_vars("quantile")
    return xr.Dataset({"median": median, "low": low, "high": high, "seeds": known.count("seed")})


def side_by_side(runs: Runs) -> tuple[str, dict[str, xr.DataTree]]:
    """One run per measure, of the first condition with pruned networks, and the printed name of what they share."""
    rows, names = first_comparison(runs), names_of_conditions(comparisons(runs))
    chosen = rows.drop_duplicates("measure")
    seeds = f", seed {chosen.seed.iloc[0]}" if len(chosen) < len(rows) and chosen.seed.nunique() == 1 else ""
    return f"{names[rows.index[0]]}{seeds}", {label: runs[label] for label in chosen.run}


def title(label: str, runs: Runs) -> str:
    """One of several runs in print, with every setting in which they differ.

    ``VGG-13, digits, 70% pruned in 5 rounds, magnitude, seed 0``; if its model is unknown, its measure.
    """
    table = conditions(runs)
    of = table.loc[label]
    measure = name_of(of.measure)
    if not of.model:
        return measure
    return ", ".join([names_of_conditions(table)[label], measure, f"seed {of.seed}"])


def _compared(runs: Runs, jobs: Mapping[str, tuple[pd.DataFrame, Callable]]) -> dict[str, ByMeasure]:
    found: dict[str, ByMeasure] = {}
    missing = MissingQuantityError("no runs given")
    for name, (rows, analyse) in jobs.items():
        for measure, labels in rows.groupby("measure", sort=False).run:
            try:
                analysed = each({label: runs[label] for label in labels}, analyse)
            except MissingQuantityError as error:
                missing = error
                continue
            found.setdefault(name, {})[measure] = xr.concat(analysed.values(), "seed", join="outer")
    if not found:
        raise missing
    return found


def _training_after(run: xr.DataTree, since: int) -> xr.Dataset:
    if not ended(run):
        raise MissingQuantityError("no run has ended: convergence is known only after the last epoch of the experiment")
    found = convergence(run, since=since)
    loss = epoch_means(run, since=since, center=True)
    return found.assign(loss=loss, steps=found.attrs["steps"])
