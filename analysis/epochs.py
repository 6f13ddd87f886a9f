"""What was logged of a training's epochs, as a curve over training, however often a loop logs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from .record import node


def logged(run: xr.DataTree) -> xr.Dataset:
    """``/epochs`` over ``epoch``, the number that were over: 0 before training, 1 after the first, 1.5 amid the next.

    What several calls logged at one step is one row. Of records that do not say the steps, a row is of its epoch's end.

    Raises:
        MissingQuantityError: no epochs were logged.
    """
    epochs = node(run, "epochs", ["epoch"])
    by_steps = "step" in epochs
    rows = epochs.to_dataframe().reset_index().groupby("step" if by_steps else "epoch", as_index=False).last()
    rows["epoch"] = over(epochs, rows.step) if by_steps else rows.epoch + 1
    merged = xr.Dataset.from_dataframe(rows.set_index("epoch"))
    return merged.map(lambda values: values.assign_attrs(epochs[values.name].attrs))


def over(epochs: xr.Dataset, steps: np.ndarray) -> np.ndarray:
    """How many epochs were over at each step, from ``/epochs``: between their ends in proportion to the steps."""
    ends = pd.Series(epochs.step.values, epochs.epoch.values)
    ends = ends[ends > 0].groupby(level=0).max()
    return np.interp(steps, np.r_[0, ends], np.r_[0, ends.index + 1]).round(6)
