"""Checks of what a function was given: if it is something else, one sentence says what it needs and what it got."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr


def check_prediction(prediction: Any, *dims: str) -> None:
    """Check that this is a dataset of measured and predicted values, of the first and the second order.

    Args:
        prediction: what was given.
        dims: if any, its only dimensions.

    Raises:
        ValueError: it is not.
    """
    parts = {"measured", "first_order", "second_order"}
    fits = isinstance(prediction, xr.Dataset) and parts <= set(prediction)
    check(fits, "a prediction beside its measurement, such as analysis.loss_decrease(run)", prediction)
    if dims and set(prediction.measured.dims) != set(dims):
        found = ", ".join(map(str, prediction.measured.dims)) or "nothing"
        raise ValueError(f"give a prediction over {' and '.join(dims)} alone, got one over {found}")


def check_order(order: object, prediction: xr.Dataset) -> None:
    """Check that this names one of the predictions in the dataset.

    Raises:
        ValueError: it does not.
    """
    orders = [name for name in prediction.data_vars if name != "measured"]
    if order not in orders:
        raise ValueError(f"order must be one of {', '.join(map(str, orders))}, got {in_a_line(order)}")


def check_analysis(analyse: object) -> None:
    """Check that this can be applied to a record.

    Raises:
        ValueError: it cannot.
    """
    check(callable(analyse), "a function of a record, such as analysis.loss_decrease", analyse)


def check_claims(found: object) -> None:
    """Check that this is the table that :func:`analysis.claims` returns.

    Raises:
        ValueError: it is not.
    """
    fits = isinstance(found, pd.DataFrame) and {"claim", "verdict"} <= set(found)
    check(fits, "the table of claims, analysis.claims(runs)", found)


def check_array(values: object, dim: str) -> None:
    """Check that this is an array over this dimension, among others.

    Raises:
        ValueError: it is not.
    """
    check(isinstance(values, xr.DataArray) and dim in values.dims, f"a DataArray over {dim}", values)


def check_axes(values: Any, *names: str) -> None:
    """Check that this is an array over these dimensions alone, or over others with coordinates of these names.

    Raises:
        ValueError: it is not.
    """
    fits = isinstance(values, xr.DataArray) and {*names} <= {*values.dims, *values.coords}
    fits = fits and sorted(values[name].dims for name in names) == sorted((dim,) for dim in values.dims)
    check(fits, f"a DataArray over {' and '.join(names)} alone", values)


def check_steps(steps: object) -> None:
    """Check that these are numbers of steps.

    Raises:
        ValueError: they are not.
    """
    fits = isinstance(steps, Collection) and all(isinstance(step, Real) for step in steps)
    check(fits, "steps as numbers, such as run.pruning.step.values", steps)


def check_count(count: object, name: str, what: str, *, least: int) -> None:
    """Check that this is a whole number, ``least`` or more.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name} must be {what} >= {least}, got {count!r:.60}")


def check_path(path: object) -> None:
    """Check that this is a path.

    Raises:
        ValueError: it is not.
    """
    check(isinstance(path, str | Path), "the path of a record as text or Path", path)


def in_a_line(given: object) -> str:
    """What was given as text, in one short line."""
    return " ".join(repr(given).split())[:60]


def check(fits: bool, needed: str, given: object) -> None:
    """Say in one sentence what is needed, and of what type what was given is.

    Raises:
        ValueError: it does not fit.
    """
    if not fits:
        dims = f" over {', '.join(map(str, given.dims)) or 'nothing'}" if isinstance(given, xr.DataArray) else ""
        raise ValueError(f"give {needed}, got a {type(given).__name__}{dims}")
