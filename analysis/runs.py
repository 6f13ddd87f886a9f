"""Runs by label, the form in which analyses take several records, and applying an analysis of one record to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import xarray as xr

from .given import check_analysis, in_a_line
from .progress import with_progress
from .record import MissingQuantityError

Runs = Mapping[str, xr.DataTree]


def check_runs(runs: object) -> None:
    """Check that runs are a mapping of labels to records, not a single record, whose groups would pass for runs.

    Raises:
        ValueError: they are not, or there are none.
    """
    if not isinstance(runs, Mapping) or isinstance(runs, xr.DataTree | xr.Dataset):
        raise ValueError(f"give runs by label, such as {{'my run': open_run(path)}}, got a {type(runs).__name__}")
    if not runs:
        raise ValueError("no runs: give at least one record, as analysis.open_runs(paths) does")
    if other := [label for label, run in runs.items() if not isinstance(run, xr.DataTree)]:
        raise ValueError(f"a run must be a record, open_run(path), got {in_a_line(runs[other[0]])} for {other[0]!r}")


def each(runs: Runs, analyse: Callable[[xr.DataTree], xr.Dataset]) -> dict[str, xr.Dataset]:
    """Apply an analysis to every run that recorded what it needs.

    Raises:
        MissingQuantityError: none of the runs did. ValueError: the runs are not given by label, or there are none, or
            ``analyse`` is no function.
    """
    check_runs(runs)
    check_analysis(analyse)
    found: dict[str, xr.Dataset] = {}
    for label, run in with_progress(runs.items(), "theory"):
        try:
            found[label] = analyse(run)
        except MissingQuantityError as error:
            missing = error
    if not found:
        raise missing
    return found
