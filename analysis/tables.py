"""The tables that people read: runs side by side, and theory against measurement."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from .agreement import agreement
from .findings import each
from .outcome import outcome, pruned_units
from .typeset import MISSING


def outcome_table(runs: Mapping[str, xr.DataTree]) -> pd.DataFrame:
    """One row a run: accuracy, loss and sparsity, in words and per cent."""
    rows, units = {}, pruned_units(runs.values())
    for label, run in runs.items():
        found = outcome(run)
        rows[label] = {
            "test accuracy": _percent(found.test_accuracy),
            "test loss": MISSING if np.isnan(found.test_loss) else f"{float(found.test_loss):.4f}",
            f"{units} pruned": _percent(found.sparsity),
            "parameters pruned": _percent(found.removed_parameters),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def brief_table(runs: Mapping[str, xr.DataTree]) -> pd.DataFrame:
    """One row a run: :func:`outcome_table`, and how far off the predictions of a step are, in the median."""
    table = outcome_table(runs)
    table.columns = pd.MultiIndex.from_tuples(
        [("test", "accuracy"), ("test", "loss"), ("pruned", pruned_units(runs.values())), ("pruned", "parameters")]
    )
    for label, found in each(runs, agreement).items():
        errors = found.median_relative_error
        for relation in (name for name in ("loss decrease", "norm rate") if name in errors.relation):
            for order in errors.order.values:
                column = (f"error of {relation}", order.removesuffix("_order"))
                table.loc[label, column] = _percent(errors.sel(relation=relation, order=order))
    return table


def agreement_table(runs: Mapping[str, xr.DataTree]) -> pd.DataFrame:
    """One row a run, relation and order: the summary figures of :func:`analysis.agree`. Runs without any are left out.

    Raises:
        MissingQuantityError: all runs are.
    """
    frames = [found.to_dataframe().assign(run=label) for label, found in each(runs, agreement).items()]
    table = pd.concat(frames).reset_index()
    table = table[table["count"] > 0]
    table["order"] = table["order"].str.removesuffix("_order")
    for key in ("relation", "order"):  # the order of first appearance, not the alphabet's
        table[key] = pd.Categorical(table[key], table[key].unique(), ordered=True)
    table = table.sort_values(["relation", "order"], kind="stable").set_index(["relation", "order", "run"])
    return table.rename(columns=lambda name: name.replace("_", " "))


def _percent(value: xr.DataArray) -> str:
    return f"{float(value):.1%}" if np.isfinite(value) else MISSING
