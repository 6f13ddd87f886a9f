"""The training losses that a loop logged: at each step, or only now and then."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .record import columns


def logged_losses(run: xr.DataTree, *, since: int = 0) -> xr.Dataset:
    """``loss`` and ``epoch`` of the steps from ``since`` on whose loss was logged.

    Many loops log at every tenth step or so: a step without a loss is left out. But where no loss comes any more, for
    at least as many steps as lay between two at most, the training has diverged: those steps stay, with their NaN.

    Raises:
        MissingQuantityError: no loss was logged at all.
    """
    steps = columns(run, "steps", ["loss", "epoch"]).sel(step=slice(since, None))
    (at,) = np.nonzero(steps.loss.notnull().values)
    last, most = (at[-1], np.diff(at).max(initial=1)) if at.size else (-1, 0)
    if steps.sizes["step"] - 1 - last >= most:
        at = np.r_[at, last + 1 : steps.sizes["step"]]
    return steps.isel(step=at)
