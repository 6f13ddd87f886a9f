"""Which events of a run are prunings, when they happened, and how sparsities compound if the network was shrunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from .epochs import epochs_completed
from .record import HOW_TO_RECORD, MissingQuantityError, columns, has, length
from .remembered import remembered


@remembered
def prunings(run: xr.DataTree) -> np.ndarray:
    """Positions of the prunings among a run's events: those of kind "prune", and those that removed parameters.

    Other events, such as a new learning rate, are not prunings. If a record gives neither the kind of its events nor
    what they removed, all of them count.
    """
    said = []
    if has(run, "pruning", "kind"):
        said.append(columns(run, "pruning", ["kind"]).kind.values == "prune")
    if has(run, "pruning", "removed"):
        said.append(columns(run, "pruning", ["removed"]).removed.sum("layer").values > 0)
    return np.flatnonzero(np.any(said, axis=0)) if said else np.arange(length(run, "pruning"))


def at_prunings(run: xr.DataTree, needs: Iterable[str]) -> xr.Dataset:
    """These variables of /pruning at the prunings, not at other events, in memory.

    Raises:
        MissingQuantityError: the node lacks one of them, or no event is a pruning.
    """
    return of_prunings(run, columns(run, "pruning", needs))


def of_prunings(run: xr.DataTree, events: xr.Dataset) -> xr.Dataset:
    """The rows of the given events that are prunings.

    Raises:
        MissingQuantityError: no event is a pruning.
    """
    if not len(chosen := prunings(run)):
        raise MissingQuantityError(f"no event in /pruning is a pruning. {HOW_TO_RECORD['pruning']}")
    return events.isel(event=chosen)


def event_steps(run: xr.DataTree) -> list[int]:
    """For each event of a run, the step that followed it."""
    return columns(run, "pruning", ["step"]).step.values.tolist() if has(run, "pruning", "step") else []


def in_steps(run: xr.DataTree) -> tuple[list[int], list[int]]:
    """The steps that followed the prunings of a run, and those that followed its other events."""
    return _of_prunings_and_others(run, event_steps(run))


def in_epochs(run: xr.DataTree) -> tuple[list[float], list[float]]:
    """Number of epochs completed at each pruning of a run, and at each of its other events: 1.5 is amid the second.

    It is found from the steps taken before the event and before each epoch was logged; in records without these, an
    event counts as at the end of its epoch.
    """
    if has(run, "epochs", "step", "epoch") and has(run, "pruning", "step"):
        completed = epochs_completed(columns(run, "epochs", ["step", "epoch"]), event_steps(run))
        return _of_prunings_and_others(run, completed)
    ends = columns(run, "pruning", ["epoch"]).epoch.values + 1.0 if has(run, "pruning", "epoch") else []
    return _of_prunings_and_others(run, ends)


def _of_prunings_and_others(run: xr.DataTree, times: Sequence[float] | np.ndarray) -> tuple[list, list]:
    """Split the times of all events into those of prunings and those of others; both are empty if times are unknown."""
    pruned = np.isin(np.arange(len(times)), prunings(run))
    return np.array(times)[pruned].tolist(), np.array(times)[~pruned].tolist()


def compounded(events: xr.Dataset, name: str) -> float:
    """The sparsity after all prunings, as a share of the units that the network had before the first.

    1 − Π(1 − s), over the successive networks, each shrunk from the one before, where s is a network's last known
    sparsity. NaN if none is known.
    """
    known = events[name].values
    last = [known[part][np.isfinite(known[part])][-1:] for part in networks(events)]
    found = np.concatenate([np.empty(0), *last])
    if len(found) < 2:
        return float(found[0]) if len(found) else np.nan
    return float(np.round(1 - np.prod(1 - found), 12))


def networks(events: xr.Dataset) -> list[np.ndarray]:
    """Positions of the prunings, split by network: a new one begins if the network was shrunk since the last pruning.

    That shows in the number of parameters before anything was pruned or, if these were not counted, in parameters that
    vanished between two prunings.
    """
    every = np.arange(events.sizes["event"])
    if "dense_parameters" in events and events.dense_parameters.notnull().any():
        dense = pd.Series(events.dense_parameters.values).ffill().bfill()
        return np.split(every, np.flatnonzero(np.diff(dense)) + 1)
    if "remaining" not in events:
        return [every]
    before, after = events.remaining.sum("layer").transpose("stage", "event").values
    return np.split(every, np.flatnonzero(before[1:] < after[:-1]) + 1)
