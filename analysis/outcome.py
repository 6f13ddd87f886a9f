"""What a training came to: accuracy, and how much of the network is left."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .effect import filters_left
from .record import has, node


def outcome(run: xr.DataTree) -> xr.Dataset:
    """Scalars of a run: last test and training accuracy and loss (NaN where not recorded), and the shares of filters
    (``sparsity``) and of parameters (``removed_parameters``) that pruning removed.
    """
    values = dict.fromkeys(("test_accuracy", "test_loss", "train_accuracy", "train_loss"), np.nan)
    if has(run, "epochs"):
        epochs = node(run, "epochs", [])
        values |= {name: float(epochs[name][-1]) for name in values if name in epochs}
    values["sparsity"] = values["removed_parameters"] = 0.0
    if has(run, "units"):
        last = filters_left(run).isel(event=-1)
        values["sparsity"] = 1 - float(last.left.sum() / last.total.sum())
    if has(run, "pruning"):
        remaining = node(run, "pruning", ["remaining"]).remaining.sum("layer")
        values["removed_parameters"] = 1 - float(remaining[-1, 1] / remaining[0, 0])
    return xr.Dataset(values)


def training_curve(run: xr.DataTree) -> xr.Dataset:
    """Loss and accuracy of each epoch, training and test, over ``epoch`` counted from 1.

    Raises:
        MissingQuantityError: no epochs were logged.
    """
    epochs = node(run, "epochs", ["epoch"])
    return epochs.assign_coords(epoch=epochs.epoch + 1)
