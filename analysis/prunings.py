"""Which events of a run are prunings, when they were, and how they add up where the network was made smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from .epochs import over
from .record import HOW_TO_RECORD, MissingQuantityError, columns, has, length


def prunings(run: xr.DataTree) -> np.ndarray:
    """Positions of the prunings among the events of a run: those of kind "prune", and those that removed parameters.

    Other events, such as a new learning rate, are not prunings. If a record says neither of which kind its events are
    nor what they removed, all of them are.
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
    """Those of a run's events that are prunings.

    Raises:
        MissingQuantityError: none is.
    """
    if not len(chosen := prunings(run)):
        raise MissingQuantityError(f"no event in /pruning is a pruning. {HOW_TO_RECORD['pruning']}")
    return events.isel(event=chosen)


def event_steps(run: xr.DataTree) -> list[int]:
    """The step to come at each event of a run."""
    return columns(run, "pruning", ["step"]).step.values.tolist() if has(run, "pruning", "step") else []


def in_steps(run: xr.DataTree) -> tuple[list[int], list[int]]:
    """The step to come at each pruning of a run, and at each of its other events."""
    return _of_prunings_and_others(run, event_steps(run))


def in_epochs(run: xr.DataTree) -> tuple[list[float], list[float]]:
    """How many epochs were over at each pruning of a run, and at each of its other events: 1.5 is amid the second.

    By the steps that were taken before it and before each epoch was logged; of records that do not say these, by the
    epoch that it was in, as if at its end.
    """
    if has(run, "epochs", "step", "epoch") and has(run, "pruning", "step"):
        return _of_prunings_and_others(run, over(columns(run, "epochs", ["step", "epoch"]), event_steps(run)))
    ends = columns(run, "pruning", ["epoch"]).epoch.values + 1.0 if has(run, "pruning", "epoch") else []
    return _of_prunings_and_others(run, ends)


def _of_prunings_and_others(run: xr.DataTree, times: Sequence[float]) -> tuple[list, list]:
    """Of the times of all events those of the prunings and those of the others; none where they are not known."""
    pruned = np.isin(np.arange(len(times)), prunings(run))
    return np.array(times)[pruned].tolist(), np.array(times)[~pruned].tolist()


def compounded(events: xr.Dataset, name: str) -> float:
    """A sparsity after all prunings, as a share of the units of the network as it was before the first.

    1 − Π(1 − s), over the networks that were pruned one after the other, each the smaller one that was made of that
    before; s is the last known of a network. NaN where none is known.
    """
    known = events[name].values
    last = [known[part][np.isfinite(known[part])][-1:] for part in networks(events)]
    found = np.concatenate([np.empty(0), *last])
    if len(found) < 2:
        return float(found[0]) if len(found) else np.nan
    return float(np.round(1 - np.prod(1 - found), 12))


def networks(events: xr.Dataset) -> list[np.ndarray]:
    """Positions of the prunings of each network: of one that was made smaller, fewer parameters are there before it.

    By the parameters before anything was pruned; where they were not counted, by those that went between two prunings.
    """
    every = np.arange(events.sizes["event"])
    if "dense_parameters" in events and events.dense_parameters.notnull().any():
        dense = pd.Series(events.dense_parameters.values).ffill().bfill()
        return np.split(every, np.flatnonzero(np.diff(dense)) + 1)
    if "remaining" not in events:
        return [every]
    before, after = events.remaining.sum("layer").transpose("stage", "event").values
    return np.split(every, np.flatnonzero(before[1:] < after[:-1]) + 1)
