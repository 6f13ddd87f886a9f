"""The scalars logged for epochs as curves over training, however often a loop logs them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from .record import node
from .remembered import remembered


@remembered
def logged(run: xr.DataTree) -> xr.Dataset:
    """``/epochs`` over ``epoch``, the number completed: 0 before training, 1 after the first, 1.5 amid the second.

    Several calls at one step make one row. In records without steps in ``/epochs``, a row belongs to its epoch's end.

    Raises:
        MissingQuantityError: no epochs were logged.
    """
    epochs = node(run, "epochs", ["epoch"])
    by_steps = "step" in epochs
    rows = epochs.to_dataframe().reset_index().groupby("step" if by_steps else "epoch", as_index=False).last()
    rows["epoch"] = epochs_completed(epochs, rows.step) if by_steps else rows.epoch + 1
    merged = xr.Dataset.from_dataframe(rows.set_index("epoch"))
    return merged.map(lambda values: values.assign_attrs(epochs[values.name].attrs))


def epochs_completed(epochs: xr.Dataset, steps: ArrayLike) -> np.ndarray:
    """Number of epochs completed at each step, from ``/epochs``, interpolated linearly between the ends of epochs.

    Where rows are logged amid epochs, too, the last epoch is not over before it is as long as the one before.
    """
    logged = pd.Series(epochs.step.values, epochs.epoch.values)
    by_epoch = logged[logged > 0].groupby(level=0)
    ends, completed = np.r_[0, by_epoch.max()], np.r_[0.0, by_epoch.max().index + 1]
    if len(ends) > 2 and (by_epoch.nunique().iloc[:-1] > 1).any():
        steps_per_epoch = (ends[-2] - ends[-3]) / (completed[-2] - completed[-3])
        completed[-1] = min(completed[-1], completed[-2] + (ends[-1] - ends[-2]) / steps_per_epoch)
    return np.interp(np.asarray(steps), ends, completed).round(6)
