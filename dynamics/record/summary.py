"""A record's contents in a few lines of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from ..schema import NODES
from ..words import counted
from .reading import experiment, planned_epochs


def summary(run: xr.DataTree) -> str:
    """Experiment, outcome, extent and origin of a record as text."""
    lines = []
    said = experiment(run) or run.attrs
    if known := [f"{name} {said[name]}" for name in ("model", "data", "measure", "seed") if name in said]:
        lines.append("experiment  " + ", ".join(known))
    if reached := _outcome(run):
        lines.append("came to     " + ", ".join(reached))
    for name, node in run.children.items():
        rows = node.sizes.get(NODES[name][0], 0) if name in NODES else len(node.sizes)
        sizes = " × ".join(map(counted, node.sizes.values(), map(str, node.sizes))) if rows else "empty"
        lines.append(f"/{name:<10} {sizes}" + (f": {', '.join(map(str, node.data_vars))}" if node.data_vars else ""))
    origin = ", ".join(
        f"{name} {run.attrs[name]}" for name in ("thetadot", "commit", "torch", "device") if run.attrs.get(name)
    )
    return "\n".join([*lines, f"recorded    {run.attrs.get('created', '')} with {origin}"])


def _outcome(run: xr.DataTree) -> list[str]:
    """The last known test accuracy and sparsity, and the numbers of steps and events."""
    said = []
    for node, name, words in (("epochs", "test_accuracy", "test accuracy"), ("pruning", "sparsity", "sparsity")):
        values: Any = run[node][name].values if name in run.children.get(node, ()) else np.empty(0)
        if values.dtype.kind == "f" and (known := values[np.isfinite(values)]).size:  # a user's own may be text
            said.append(f"{words} {known[-1]:.1%}")
    if "step" in run.children.get("steps", ()) and (recorded := run["steps"].sizes["step"]):
        taken = _taken(run)
        said.append(counted(taken, "step"))
        logged = run["epochs"].sizes.get("epoch", 0) if "epochs" in run.children else 0
        whole = planned_epochs(run)
        said += [f"unfinished after {logged} of {counted(whole, 'epoch')}"] * (logged < whole)
        said += [f"{recorded} of them recorded"] * (recorded < taken)
    if "pruning" in run.children and (events := run["pruning"].sizes.get("event", 0)):
        said.append(counted(events, "event"))
    return said


def _taken(run: xr.DataTree) -> int:
    """How many steps were taken, judged by the last recorded step, event and logged epoch."""
    behind = [run[node].step.values for node in ("epochs", "pruning") if "step" in run.children.get(node, ())]
    return int(max([run["steps"].step.values[-1] + 1, *(steps.max() for steps in behind if steps.size)]))
