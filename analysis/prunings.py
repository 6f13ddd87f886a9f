"""Which events of a run are prunings, and how they add up where the network was made smaller between them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr


def prunings(run: xr.DataTree) -> np.ndarray:
    """Positions of the prunings among the events of a run: those of kind "prune", and those that removed parameters.

    Other events (a new learning rate, say, with a look at what it does) are none. Where a record says neither what kind
    its events are nor what they removed, all are.
    """
    events = run["pruning"].to_dataset() if "pruning" in run.children else xr.Dataset()
    said = []
    if "kind" in events:
        said.append(events.kind.values == "prune")
    if "removed" in events:
        said.append(events.removed.sum("layer").values > 0)
    return np.flatnonzero(np.any(said, axis=0)) if said else np.arange(events.sizes.get("event", 0))


def others(run: xr.DataTree) -> np.ndarray:
    """Positions of the events of a run that are no :func:`prunings`."""
    events = run["pruning"].sizes.get("event", 0) if "pruning" in run.children else 0
    return np.setdiff1d(np.arange(events), prunings(run))


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
