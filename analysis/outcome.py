"""The outcome of a training: accuracy, and how much of the network is left."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from .effect import filters_left
from .epochs import logged
from .logged_losses import logged_losses
from .protocol import epoch_that_counts
from .prunings import compounded, networks, of_prunings, prunings
from .record import columns, has, node
from .remembered import remembered


@remembered
def outcome(run: xr.DataTree) -> xr.Dataset:
    """Scalars of a run: accuracy and loss in the epoch that counts, training and test, and what pruning removed.

    These are the shares of units (``sparsity``), of parameters (``removed_parameters``) and of multiply-adds
    (``removed_multiply_adds``) of the network before the first pruning, even if it was made smaller since; what reads
    only silent channels counts as removed. Accuracy and loss that were not recorded are NaN. Where a pruning did not
    count them, the parameters are those that are masked and the multiply-adds NaN; sparsity is NaN where neither an
    event nor its units give it.

    The last epoch counts, unless the run's protocol selects on the test set: see
    :func:`analysis.protocol.epoch_that_counts`.
    """
    values = dict.fromkeys(("test_accuracy", "test_loss", "train_accuracy", "train_loss"), np.nan)
    if has(run, "epochs"):
        epoch = epoch_that_counts(run)
        values |= {name: float(epoch[name]) for name in values if name in epoch}
    values["sparsity"] = values["removed_parameters"] = values["removed_multiply_adds"] = 0.0
    if len(prunings(run)):
        values |= _pruned(run)
    return xr.Dataset(values)


def _pruned(run: xr.DataTree) -> dict[str, float]:
    events = of_prunings(run, node(run, "pruning", ["remaining"]))
    masked, first, last = events.remaining.sum("layer"), events.isel(event=0), events.isel(event=-1)
    if "sparsity" in events and (described := np.flatnonzero(events.sparsity.notnull())).size:
        first, last = (events.isel(event=described[place]) for place in (0, -1))
    gone = 1 - float(masked[-1, 1] / masked[0, 0])
    values = {"removed_parameters": gone, "sparsity": np.nan, "removed_multiply_adds": np.nan}
    for name in ("parameters", "multiply_adds"):
        if {f"{name}_left", f"dense_{name}"} <= set(last):
            values[f"removed_{name}"] = 1 - float(last[f"{name}_left"] / first[f"dense_{name}"])
    smaller = len(networks(events)) > 1 and has(run, "units")  # /units has the original network's units
    if "sparsity" in events and not smaller:  # single weights have no rows in /units
        values["sparsity"] = compounded(events, "sparsity")
    elif has(run, "units"):
        filters = filters_left(run).isel(event=-1)
        values["sparsity"] = 1 - float(filters.left.sum() / filters.total.sum())
    return values


def pruned_units(runs: Iterable[xr.DataTree]) -> str:
    """The units that sparsity is a share of: filters, unless events say otherwise."""
    events = [columns(run, "pruning", ["granularity"]) for run in runs if has(run, "pruning", "granularity")]
    said = {unit for rows in events for unit in rows.granularity.values.tolist() if unit}
    return " or ".join(f"{unit}s" for unit in sorted(said)) or "filters"


def training_curve(run: xr.DataTree) -> xr.Dataset:
    """Training and test loss and accuracy over ``epoch``, the number of completed epochs.

    Where no training loss was logged for an epoch, it is the mean of the losses logged at its steps.

    Raises:
        MissingQuantityError: no epochs were logged.
    """
    epochs = logged(run)
    if "train_loss" not in epochs and has(run, "steps", "loss", "epoch"):
        steps = logged_losses(run)
        means = steps.loss.groupby(steps.epoch).mean(skipna=False)
        means = means.assign_coords(epoch=means.epoch + 1).reindex(epoch=epochs.epoch)
        epochs = epochs.assign(train_loss=means.assign_attrs(long_name="training loss", units="L"))
    return epochs
