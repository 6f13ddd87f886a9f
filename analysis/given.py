"""Checks of what a function was given: if it is something else, one sentence says what it needs and what it got."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path

import pandas as pd
import xarray as xr


def check_prediction(prediction: object) -> None:
    """Check that this is a dataset of measured and predicted values, of the first and the second order.

    Raises:
        ValueError: it is not.
    """
    parts = {"measured", "first_order", "second_order"}
    fits = isinstance(prediction, xr.Dataset) and parts <= set(prediction)
    _check(fits, "a prediction beside its measurement, such as analysis.loss_decrease(run)", prediction)


def check_claims(found: object) -> None:
    """Check that this is the table that :func:`analysis.claims` returns.

    Raises:
        ValueError: it is not.
    """
    fits = isinstance(found, pd.DataFrame) and {"claim", "verdict"} <= set(found)
    _check(fits, "the table of claims, analysis.claims(runs)", found)


def check_array(values: object, dim: str) -> None:
    """Check that this is an array over the dimension ``dim``, which may have others.

    Raises:
        ValueError: it is not.
    """
    _check(isinstance(values, xr.DataArray) and dim in values.dims, f"a DataArray over {dim}", values)


def check_steps(steps: object) -> None:
    """Check that these are numbers of steps.

    Raises:
        ValueError: they are not.
    """
    fits = isinstance(steps, Collection) and all(isinstance(step, Real) for step in steps)
    _check(fits, "steps as numbers, such as run.pruning.step.values", steps)


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
    _check(isinstance(path, str | Path), "the path of a record as text or Path", path)


def _check(fits: bool, needed: str, given: object) -> None:
    if not fits:
        dims = f" over {', '.join(map(str, given.dims)) or 'nothing'}" if isinstance(given, xr.DataArray) else ""
        raise ValueError(f"give {needed}, got a {type(given).__name__}{dims}")
