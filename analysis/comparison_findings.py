"""Findings about the measures side by side: a sentence each, computed from the given runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from .conditions import comparisons, conditions, mean_by_measure
from .effect import loss_and_gradient_at_pruning
from .names import names_of
from .norm import network_norm
from .prunings import prunings
from .record import MissingQuantityError, ended
from .runs import Runs, each
from .seed_tables import VERDICTS, convergences
from .verdicts import claims


def fastest(runs: Runs) -> str:
    """The mean training loss after the last pruning of each measure, over seeds and conditions."""
    measure = conditions(runs).measure
    pruned = {
        label: run for label, run in runs.items() if measure[label] != "none" and len(prunings(run)) and ended(run)
    }
    if not pruned:
        raise MissingQuantityError("no pruned run has ended, so how fast it trained on is not known")
    table, _ = convergences(runs)
    areas = table[table.comparable & table.run.isin(pruned)].set_index("run").area
    if areas.empty:
        raise MissingQuantityError(
            "all pruned runs trained on for different numbers of steps: their mean losses differ"
        )
    means = mean_by_measure(runs, areas.to_dict())
    if means.empty:
        raise MissingQuantityError("no two pruned runs have a condition in common: their mean losses are of their own")
    return f"Mean training loss after the last pruning, lowest first: {_listed(means.sort_values(), '.3g')}."


def norm_growth(runs: Runs) -> str:
    """By which factor ‖θ‖² changed over the training, by measure: medians over seeds, as the figure has them."""
    growth = {
        label: float(found.param_sqnorm[-1] / found.param_sqnorm[0])
        for label, found in each(runs, network_norm).items()
    }
    means = mean_by_measure(runs, growth, of_seeds="median")
    if means.empty and any(map(np.isfinite, growth.values())):
        means = pd.Series(growth)  # runs of different conditions, each by its label
    several = ", medians over seeds, means over conditions" * (len(growth) > len(means))
    return f"‖θ‖² at the last step divided by that at the first{several}: {_listed(means) or 'not finite'}."


def moved_at_pruning(runs: Runs) -> str:
    """The factors by which a pruning changed loss and ‖g‖²: medians over all prunings of each measure."""
    found = each(runs, loss_and_gradient_at_pruning)
    measure = conditions(runs).measure[list(found)]
    pooled = {
        name: xr.concat([found[label][["loss", "grad_sqnorm"]] for label in labels], "event").median("event")
        for name, labels in measure.groupby(measure, sort=False).groups.items()
    }
    order = [name for name in comparisons(runs).measure.unique() if name in pooled]
    loss, norm = (
        pd.Series({name: float(pooled[name][quantity]) for name in order}) for quantity in ("loss", "grad_sqnorm")
    )
    return f"Median ratio of after to before a pruning. Loss: {_listed(loss)}. ‖g‖²: {_listed(norm)}."


def verdicts(runs: Runs) -> str:
    """How many of the claims' intervals support or contradict them, and how many stand after correction for number."""
    found = claims(runs)
    judged = found[found.low.notna()]
    counts = judged.verdict.value_counts()
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts.get(verdict))
    return f"{len(judged)} intervals: {listed}; {judged.stands.sum()} stand after correction for their number."


def _listed(values: pd.Series, form: str = "") -> str:
    """The finite values by name; without a ``form``, ratios with two decimals or two digits."""
    names = names_of(values.index)
    printed = {name: f"{value:{form or _of_ratio(value)}}" for name, value in values.items() if np.isfinite(value)}
    return ", ".join(f"{names[name]} {value}" for name, value in printed.items())


def _of_ratio(value: float) -> str:
    return ".2f" if value == 0 or 0.1 <= abs(value) < 1000 else ".2g"
