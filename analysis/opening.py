"""Opening records, by labels that tell them apart."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import xarray as xr

from dynamics.record.errors import RecordError
from dynamics.record.reading import experiment, open_run

from .condensed import SUFFIX, expand
from .given import check_path
from .progress import with_progress


def open_runs(paths: str | Path | Iterable[str | Path]) -> dict[str, xr.DataTree]:
    """Open records under short labels that tell them apart: their measures where these differ, else their file names.

    A file of condensed records (:func:`analysis.condense`) stands for all records in it; a path with ``*``, ``?`` or
    ``[...]`` stands for all paths that it matches, sorted by name.

    Raises:
        RecordError: a path is not a record, or matches none.
        ValueError: what is given is no path.
    """
    given = list(paths) if isinstance(paths, Iterable) and not isinstance(paths, str | bytes) else [paths]
    for path in given:
        check_path(path)
    runs: dict[str, xr.DataTree] = {}
    for path in with_progress(dict.fromkeys(path for one in given for path in _matching(str(Path(one)))), "opening"):
        if path.endswith(SUFFIX):
            runs |= {f"{path}/{name}": run for name, run in expand(path).items()}
        else:
            runs[path] = open_run(path)
    paths = list(runs)
    measures = [(experiment(run) or run.attrs).get("measure") for run in runs.values()]
    stems = [Path(path).name.removesuffix(".zarr") for path in paths]
    for labels in (measures, stems):
        if None not in labels and len(set(labels)) == len(labels):
            return dict(zip(labels, runs.values(), strict=True))
    return runs


def _matching(path: str) -> list[str]:
    """The path itself, or the paths that its pattern matches, sorted."""
    if Path(path).exists() or not set(path) & set("*?["):
        return [path]
    if found := sorted(glob.glob(path)):
        return found
    raise RecordError(f"nothing matches {path}: give the paths of records, e.g. 'out/demo/*.zarr' or sweep.zarr.zip")
