"""Runs by label: what every analysis of several records is given."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

Runs = Mapping[str, xr.DataTree]


def check_runs(runs: object) -> None:
    """Refuse what is no mapping of labels to records: one record alone, whose groups would pass for runs, or a list.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(runs, Mapping) or isinstance(runs, xr.DataTree):
        raise ValueError(f"runs are given by label, {{'my run': open_run(path)}} say, got a {type(runs).__name__}")
