"""The tables that people read: runs side by side, and theory against measurement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from dynamics.record.reading import planned_epochs

from .agreement import agreement
from .findings import NOT_FINITE, error_in_percent
from .outcome import outcome, pruned_units
from .prunings import prunings
from .record import MissingQuantityError, ended, length
from .runs import Runs, check_runs, each
from .typeset import MISSING, known


def outcome_table(runs: Runs) -> pd.DataFrame:
    """One row per run: accuracy and loss and, if any run was pruned, sparsity, in words and per cent.

    If a run has not ended, the epochs that each has completed.
    """
    table = _outcomes(runs)
    table.columns = [f"{what} pruned" if of == "pruned" else f"{of} {what}" for of, what in table]
    return table


def brief_table(runs: Runs) -> pd.DataFrame:
    """One row per run: :func:`outcome_table`, and the median error of predictions for a step, with their number."""
    table = _outcomes(runs)
    try:
        found = each(runs, agreement)
    except MissingQuantityError:
        return table
    for label, agreed in found.items():
        errors = agreed.median_relative_error
        for relation in (name for name in ("loss decrease", "norm rate") if name in errors.relation):
            for order in errors.order.values:
                column = (f"error of {relation}", order.removesuffix("_order"))
                error = float(errors.sel(relation=relation, order=order))
                table.loc[label, column] = error_in_percent(error) if np.isfinite(error) else MISSING
            counts = agreed["count"].sel(relation=relation)
            table.loc[label, (f"error of {relation}", "count")] = str(int(counts.max("order")))
    return table


def _outcomes(runs: Runs) -> pd.DataFrame:
    check_runs(runs)
    found = {label: outcome(run) for label, run in runs.items()}
    rows = {
        ("test", "accuracy"): [known(of.test_accuracy, ".1%") for of in found.values()],
        ("test", "loss"): [known(of.test_loss, ".4f") for of in found.values()],
    }
    if any(len(prunings(run)) for run in runs.values()):
        rows["pruned", pruned_units(runs.values())] = [known(of.sparsity, ".1%") for of in found.values()]
        rows["pruned", "parameters"] = [known(of.removed_parameters, ".1%") for of in found.values()]
    if not all(map(ended, runs.values())):
        rows["epochs", "completed"] = [_completed(run) for run in runs.values()]
    return pd.DataFrame(rows, index=pd.Index(found, name="run"))


def _completed(run: xr.DataTree) -> str:
    """The number of epochs logged, of those that the experiment has."""
    whole = planned_epochs(run)
    return f"{length(run, 'epochs')} of {whole}" if whole else MISSING


def agreement_table(runs: Runs) -> pd.DataFrame:
    """One row per run, relation and order: the numbers of :func:`analysis.agree`. Runs without any are left out.

    Raises:
        MissingQuantityError: no run has any.
    """
    frames = [found.to_dataframe().assign(run=label) for label, found in each(runs, agreement).items()]
    table = pd.concat(frames).reset_index()
    table = table[table["count"] > 0]
    if table.empty:
        raise MissingQuantityError(NOT_FINITE)
    table["order"] = table["order"].str.removesuffix("_order")
    for key in ("relation", "order"):  # the order of first appearance, not the alphabet's
        table[key] = pd.Categorical(table[key], table[key].unique(), ordered=True)
    table = table.sort_values(["relation", "order"], kind="stable").set_index(["relation", "order", "run"])
    return table.rename(columns=lambda name: name.replace("_", " "))
