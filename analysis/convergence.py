"""How fast a network trains on after its last pruning."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from .given import check_count
from .logged_losses import epoch_means, logged_losses
from .prunings import in_steps
from .record import MissingQuantityError, columns, described
from .remembered import remembered

SHARES = (0.75, 0.5, 0.25, 0.1)


def convergence(run: xr.DataTree, *, since: int | None = None) -> xr.Dataset:
    """Area under the curve of the training loss after the last pruning, and steps to reach a loss.

    =============  ===================================================================================================
    area           mean of L(s) over the steps s >= ``since``: the area under the curve, per step; unit L
    final_loss     mean of L(s) over as many last steps as an epoch has
    steps_to_loss  number of steps from ``since`` until the mean loss of an epoch's steps is ``share`` of the first
                   loss of the record, over ``share``; inf where that is not reached within the record, NaN where
                   the first loss is not positive, of which there is no share
    =============  ===================================================================================================

    L(s) is the logged loss of step s's own batch, before that step. Where a loop logs it at some steps only, it stands
    for all steps until the next; means are NaN where it is logged no more, as after a training has diverged. The area
    needs no threshold and is known for every run, so comparisons use it. Steps to a loss say the same in units of work.
    The loss is averaged over an epoch, so that every sample counts once; it starts at ``since``, so the least possible
    value is one epoch. It is relative to the first loss, which all measures of a seed have in common. inf is a censored
    time, which may be ranked but not averaged. Attributes: ``since``, and ``steps`` from there on.

    Args:
        run: the record.
        since: step to start from; by default that of the last pruning, or 0 if there is none. A network that was not
            pruned is compared with others from *their* last pruning on.

    Raises:
        MissingQuantityError: no loss was logged, or none from ``since`` on. ValueError: ``since`` is no step.
    """
    if since is not None:
        check_count(since, "since", "a step", least=0)
    return _since(run, start=last_pruning(run) if since is None else since)


@remembered
def _since(run: xr.DataTree, *, start: int) -> xr.Dataset:
    steps = columns(run, "steps", ["loss", "epoch"])
    if not (steps.step >= start).any():
        raise MissingQuantityError(f"/steps needs rows from step {start} on: train on after the last pruning")
    after = logged_losses(run, since=start).loss
    rows = steps.step.sel(step=slice(start, None))
    stands_for = xr.DataArray(np.diff(np.r_[np.searchsorted(rows, after.step), rows.size]), dims="step")
    epoch_mean = epoch_means(run, since=start)
    share = xr.DataArray(list(SHARES), dims="share", coords={"share": list(SHARES)})
    first = float(logged_losses(run).loss[0])
    taken = epoch_mean.step.where(epoch_mean <= share * first).min("step") - start + 1
    found = xr.Dataset(
        {
            "area": (after * stands_for).sum(skipna=False) / stands_for.sum(),
            "final_loss": epoch_mean[-1],
            "steps_to_loss": taken.fillna(np.inf).where(first > 0),
        }
    )
    found["steps_to_loss"].attrs = {"long_name": "steps to the share of the first loss", "units": "1"}
    return described(
        found.drop_vars("step", errors="ignore").assign_attrs(since=start, steps=int(steps.step[-1]) - start + 1),
        "loss", area="mean training loss after pruning", final_loss="final training loss",
    )  # fmt: skip


def equally_long(steps: pd.Series, *, pruned: pd.Series | np.ndarray | None = None) -> pd.Series:
    """Whether each run took as many steps as most of these runs, or of those that were ``pruned``, if any was.

    The mean losses of runs are compared, and averaged, only over equally many steps: longer training lowers them. If
    several numbers of steps are the most frequent, no run took as many as most.
    """
    known = steps.dropna() if pruned is None else steps[pruned].dropna()
    most = (known if len(known) else steps).mode()
    return steps == (most.iloc[0] if len(most) == 1 else np.nan)


def last_pruning(run: xr.DataTree) -> int:
    """The step that followed the last pruning; 0 if there was none."""
    return next(reversed(in_steps(run)[0]), 0)
