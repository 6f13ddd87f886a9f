"""The statistics of runs as a table, one row per run."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pandas as pd
import xarray as xr

from .conditions import conditions
from .convergence import convergence, equally_long
from .progress import with_progress
from .record import MissingQuantityError, ended
from .remembered import remembered
from .runs import Runs
from .statistics import STATISTICS


def statistics(runs: Runs) -> pd.DataFrame:
    """Every statistic of :data:`STATISTICS`, one row per run, after the columns of :func:`analysis.conditions`.

    NaN where a record lacks what a statistic needs, where the statistic is a change from zero (of a network that is
    already dead), and for runs that have not ended, whose outcome is not known. ``training_area`` is also NaN for runs
    that :func:`trained_unevenly`: the longer a run, the lower its mean loss.
    """
    table = conditions(runs)
    found = [_values(run) for run in with_progress(runs.values(), "claims")]
    table = table.join(pd.DataFrame(found, index=list(runs)))
    return table.assign(training_area=table.training_area.mask(trained_unevenly(runs)))


def trained_unevenly(runs: Runs) -> pd.Series:
    """Whether each run trained for a different number of steps after its last pruning than most runs of its seed.

    The comparison is among the pruned runs of a condition and seed that ended and logged their loss; if no number of
    steps is the most common one, all of them are uneven.
    """
    table = conditions(runs)
    table = table[table.measure != "none"]
    steps = pd.Series({label: _steps_after_pruning(runs[label]) for label in table.index}, dtype=float)
    paired = [table[name] for name in table if name != "measure"]
    even = steps.groupby(paired, dropna=False).transform(equally_long).astype(bool)
    return (steps.notna() & ~even).reindex(list(runs), fill_value=False)


def _steps_after_pruning(run: xr.DataTree) -> float:
    """Number of steps after the last pruning; NaN if it is unknown."""
    with suppress(MissingQuantityError):
        return convergence(run).attrs["steps"] if ended(run) else np.nan
    return np.nan


@remembered
def _values(run: xr.DataTree) -> dict[str, float]:
    found = dict.fromkeys(STATISTICS, np.nan)
    for name, statistic in STATISTICS.items() if ended(run) else ():
        with suppress(MissingQuantityError):
            value = statistic(run)
            found[name] = value if np.isfinite(value) else np.nan
    return found
