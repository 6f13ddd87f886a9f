"""The training losses that a loop logged: at each step, or only now and then."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .record import columns
from .remembered import remembered

_NEAR = 8  # distances between logged losses


def logged_losses(run: xr.DataTree, *, since: int = 0) -> xr.Dataset:
    """``loss`` and ``epoch`` of the steps from ``since`` on whose loss was logged.

    Many loops log at every tenth step or so: a step without a loss is left out. But steps in a row without one, more
    than lie between any of the nearest logged losses, had one that is no number: they stay, with their NaN.

    Raises:
        MissingQuantityError: no loss was logged at all.
    """
    steps = _with_known(run, since=since)
    return steps.isel(step=np.flatnonzero(steps.known.values)).drop_vars("known")


def epoch_means(run: xr.DataTree, *, since: int = 0, center: bool = False) -> xr.DataArray:
    """Mean of the losses logged in as many steps as an epoch has, up to a step or, if ``center``, around it.

    Around the ends, these may be half as many. NaN where a loss is no number.

    Raises:
        MissingQuantityError: no loss was logged at all.
    """
    steps = _with_known(run, since=since)
    epochs = columns(run, "steps", ["epoch"]).epoch.values
    window = min(int(np.unique_counts(epochs).counts.max()), steps.sizes["step"])
    rolling = {"center": center, "min_periods": max(1, window // 2) if center else window}
    logged = steps.known & steps.loss.notnull()
    total, count, lost = (
        values.rolling(step=window, **rolling).sum()
        for values in (steps.loss.fillna(0), logged.astype(float), (steps.known & ~logged).astype(float))
    )
    return (total / count.where(count > 0)).where(lost == 0)


@remembered
def _with_known(run: xr.DataTree, *, since: int) -> xr.Dataset:
    """The steps from ``since`` on; ``known`` are those with a logged loss, and those of a training that diverged."""
    steps = columns(run, "steps", ["loss", "epoch"]).sel(step=slice(since, None))
    known = steps.loss.notnull().values.copy()
    ends = np.r_[-1, np.flatnonzero(known), steps.sizes["step"]]
    apart = np.diff(ends)
    for place in np.flatnonzero(apart > 1):
        before, after = apart[max(place - _NEAR, 1) : place], apart[place + 1 : -1][:_NEAR]
        if apart[place] > max((*before, *after), default=0):
            known[ends[place] + 1 : ends[place + 1]] = True
    return steps.assign(known=("step", known))
