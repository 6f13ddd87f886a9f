"""Reads the nodes of a record as datasets, with errors that say what is missing and how to record it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import xarray as xr

from dynamics.record.errors import RecordError
from dynamics.record.reading import planned_epochs
from dynamics.schema import NODES, QUANTITIES

from .given import in_a_line

HOW_TO_RECORD = {
    "steps": "Record with quantities=None, or name them in Recorder(quantities=...).",
    "curvature": "Record with curvature_every > 0 and quantities=None, and watch the loader or observe the batches.",
    "pruning": 'Prune inside `with recorder.event("prune", probe=batches)`.',
    "units": "Call event.units(alive=..., scores=...) inside the event.",
    "curve": 'Call event.add("curve", removal_curve(...)) inside an event.',
    "scores": 'Call event.add("scores", resampled_scores(...)) inside an event.',
    "invariance": 'Call event.add("invariance", scale_invariance(...)) inside an event.',
    "epochs": "Call recorder.log_epoch(...) after each epoch.",
}


class MissingQuantityError(RecordError):
    """The record lacks what an analysis needs. The message says what, what there is, and how to record it."""


def node(run: xr.DataTree, name: str, needs: Iterable[str]) -> xr.Dataset:
    """A node of the record as a dataset in memory, with all its variables.

    Raises:
        MissingQuantityError: the node lacks one of the variables in ``needs``.
    """
    return _loaded(_checked(run, name, needs), name)


def columns(run: xr.DataTree, name: str, needs: Iterable[str]) -> xr.Dataset:
    """Only these variables of a node, in memory: in a long record this takes a fraction of the time for all.

    Raises:
        MissingQuantityError: the node lacks one of them.
    """
    needs = list(needs)
    return _loaded(_checked(run, name, needs)[needs], name)


def _loaded(rows: xr.Dataset, name: str) -> xr.Dataset:
    try:
        loaded = rows.load()
    except RuntimeError as error:  # from the codec
        raise RecordError(f"/{name} is damaged ({error}): copy the record again") from error
    # In single precision, a small change such as ln(after/before) would be lost in the rounding of its ratio.
    narrow = {name: of.astype(np.float64) for name, of in loaded.items() if of.dtype == np.float32}
    return loaded.assign(narrow) if narrow else loaded


def _checked(run: xr.DataTree, name: str, needs: Iterable[str]) -> xr.Dataset:
    if not has(run, name):
        check_begun(run)
        raise MissingQuantityError(f"nothing was recorded in /{name}. {HOW_TO_RECORD[name]}")
    found = list(run[name].data_vars) + list(run[name].coords)
    if missing := [quantity for quantity in needs if quantity not in found]:
        if missing == ["loss"] and name == "steps":
            raise MissingQuantityError("no loss was logged. Call recorder.log(loss=...) at each step.")
        how = HOW_TO_RECORD["steps" if name == "curvature" else name]  # Recorder(quantities=...) chooses for both
        raise MissingQuantityError(f"/{name} needs {missing}; this run recorded {sorted(found)} there. {how}")
    return run[name].to_dataset()


def check_begun(*runs: xr.DataTree) -> None:
    """Raise MissingQuantityError if nothing was recorded in any of the runs."""
    if not any(has(run, name) for run in runs for name in NODES):
        raise MissingQuantityError(
            "the record holds nothing yet: no optimizer.step() and no event() was inside `with Recorder(...)`, or "
            "its recorder is still open and has not written them: call recorder.flush()"
        )


def without_skipped(run: xr.DataTree, rows: xr.Dataset) -> xr.Dataset:
    """The rows, over ``step``, of steps that were taken, without those that a gradient scaler skipped."""
    if not has(run, "steps", "skipped"):
        return rows
    skipped = columns(run, "steps", ["skipped"]).skipped.reindex(step=rows.step)
    return rows.isel(step=np.flatnonzero(skipped.values != 1))


def length(run: xr.DataTree, name: str) -> int:
    """Number of rows in a node of the record: steps, events or epochs.

    Raises:
        ValueError: ``run`` is not a record.
    """
    if not isinstance(run, xr.DataTree):
        raise ValueError(f"an analysis needs a record, open_run(path), got {in_a_line(run)}")
    if run.path.removeprefix("/") in NODES:
        raise ValueError(f"an analysis needs a whole record, open_run(path), got its group {run.path}")
    return run[name].sizes.get(NODES[name][0], 0) if name in run.children else 0


def has(run: xr.DataTree, name: str, *variables: str) -> bool:
    """Whether a node of the record has any rows, and all of these variables.

    Raises:
        ValueError: ``run`` is not a record.
    """
    return length(run, name) > 0 and bool(run[name].data_vars) and set(variables) <= set(run[name].variables)


def layers(run: xr.DataTree) -> list[str]:
    """Names of the layers recorded over the steps; "network" alone if only sums over layers were kept."""
    names = [run[name].layer.values.tolist() for name in ("steps", "curvature") if has(run, name, "layer")]
    return list(dict.fromkeys(chain.from_iterable(names)))


def ended(run: xr.DataTree) -> bool:
    """Whether all epochs of the experiment were recorded; True for a user's own loop, whose number is unknown."""
    return length(run, "epochs") >= planned_epochs(run)


def described(dataset: xr.Dataset, like: str, **symbols: str) -> xr.Dataset:
    """The dataset with a symbol for each named variable, and the unit of the quantity ``like``."""
    for name, symbol in symbols.items():
        dataset[name].attrs = {"long_name": symbol, "units": QUANTITIES[like].units}
    return dataset
