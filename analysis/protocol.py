"""The effect of a protocol and its quirks on a pruning: the sparsity reached, and which filters are pruned."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from dynamics.record.reading import configured

from .effect import filters_left
from .epochs import logged
from .opening import open_runs
from .prunings import in_epochs, prunings
from .record import MissingQuantityError, columns, has, node
from .runs import Runs, check_runs
from .typeset import known

_LABELS = {
    "run": "protocol", "asked": "asked", "reached": "reached", "multiply_adds_left": "multiply-adds left",
    "emptied": "layers emptied", "least_share": "least left of a layer", "other": "filters that differ",
}  # fmt: skip


def protocol_diff(runs: Runs) -> xr.Dataset:
    """How records of the same rounds of pruning differ from the first of them, after each round.

    Variables over (run, event), for prunings with units: the sparsity ``asked`` for and ``reached``; the share of
    multiply-adds left; the number of layers without any filter left (``emptied``) and the smallest share of a layer
    that is left (``least_share``); the number of filters that are pruned in either this run or the first one, but not
    in both (``other``).

    Raises:
        MissingQuantityError: a record has no prunings with units.
        ValueError: the runs are not given by label, there are none, or they differ in network or number of rounds.
    """
    check_runs(runs)
    rows = {label: _rounds(run) for label, run in runs.items()}
    first = next(iter(rows.values()))
    for label, row in rows.items():
        if row.sizes != first.sizes:
            raise ValueError(
                f"{label} cannot be compared with {next(iter(rows))}: both need the same filters (unit) and rounds "
                f"(event), got {dict(row.sizes)} and {dict(first.sizes)}"
            )
        row["other"] = (row.alive != first.alive).sum("unit")
    labels = xr.Variable("run", list(rows))
    return xr.concat([row.drop_vars("alive").drop_dims("unit", errors="ignore") for row in rows.values()], labels)


def _rounds(run: xr.DataTree) -> xr.Dataset:
    events, left = node(run, "pruning", ["target", "sparsity"]), filters_left(run)
    rounds = np.intersect1d(events.event[prunings(run)], left.event)
    if not rounds.size:
        raise MissingQuantityError("no pruning has units: call event.units(alive=..., scores=...) inside its event")
    events, left = events.sel(event=rounds), left.sel(event=rounds)
    costs = {"multiply_adds_left", "dense_multiply_adds"} <= set(events)
    found = xr.Dataset(
        {
            "asked": events.target,
            "reached": events.sparsity,
            "multiply_adds_left": events.multiply_adds_left / events.dense_multiply_adds
            if costs
            else xr.full_like(events.target, np.nan),
            "emptied": (left.left == 0).sum("layer"),
            "least_share": left.share.min("layer"),
            "alive": columns(run, "units", ["alive"]).alive.sel(event=rounds).astype(bool),
        }
    )
    return found.drop_vars(list(found.coords))


def protocol_table(runs: Runs) -> pd.DataFrame:
    """:func:`protocol_diff` after the last round, one row per run, in per cent."""
    last = protocol_diff(runs).isel(event=-1)
    table = last.to_dataframe().reset_index()[list(_LABELS)].rename(columns=_LABELS)
    for name in ("asked", "reached", "multiply-adds left", "least left of a layer"):
        table[name] = [known(value, ".1%") for value in table[name]]
    if all(has(run, "epochs", "test_accuracy") for run in runs.values()):
        table["test accuracy"] = [known(epoch_that_counts(run).test_accuracy, ".1%") for run in runs.values()]
    return table.set_index("protocol")


def epoch_that_counts(run: xr.DataTree) -> xr.Dataset:
    """The row of ``/epochs`` that counts: the last or, if the protocol selects on the test set, the best on that.

    What the last row lacks, because it was logged apart amid the same epoch, is what was last known in that epoch. The
    paper's code looks for the best among the epochs after the last round of pruning only.

    Raises:
        MissingQuantityError: no epochs were logged, or it is not known in which one the network was pruned.
    """
    epochs = logged(run)
    if not configured(run, "protocol").get("select_on_test") or "test_accuracy" not in epochs:
        recent = epochs.isel(epoch=np.flatnonzero(epochs.epoch > epochs.epoch[-1] - 1))
        several = recent.sizes["epoch"] > 1
        return (xr.Dataset.from_dataframe(recent.to_dataframe().ffill()) if several else recent).isel(epoch=-1)
    if len(prunings(run)):
        node(run, "pruning", ["epoch"])  # else it is not known when they were
    pruned_at, _ = in_epochs(run)
    before = int((epochs.epoch <= max(pruned_at, default=0)).sum())
    final = epochs.isel(epoch=slice(min(before, epochs.sizes["epoch"] - 1), None))
    return final.isel(epoch=int(final.test_accuracy.argmax("epoch")))


def fresh_runs(settings: Sequence[str]) -> dict[str, xr.DataTree]:
    """Records of a fresh network pruned under every protocol, in memory.

    Pruning needs torch, which is not loaded here, so ``python -m dynamics protocols SETTINGS`` runs as a subprocess.

    Raises:
        ValueError: the subprocess failed; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dynamics", "protocols", *settings, "-o", folder]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().rpartition("\n")[2].removeprefix("error: "))
        runs = open_runs(map(str, sorted(Path(folder).glob("*.zarr"))))
        ends = {"default": 0, "reference": 2}  # the others in between
        return {label: runs[label].load() for label in sorted(runs, key=lambda label: ends.get(label, 1))}
