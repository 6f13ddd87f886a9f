"""The conditions of runs, which decide what is compared, what is paired, and what is averaged over."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd
import xarray as xr

from dynamics.record.reading import experiment
from dynamics.schema import COMPARED_BY, ORIGIN, PAPER_MEASURES, PRUNING_SETTINGS

from .prunings import compounded, prunings
from .remembered import remembered
from .runs import Runs, check_runs
from .statistics import STATISTICS
from .typeset import MISSING, told_apart

MEASURES = ("none", *PAPER_MEASURES)  # the order in which they are listed; others follow

# Names of the tables' and claims' own columns, and how others end or begin: a setting of such a name gets another one.
_PERCENT, _STEPS_TO = ", %", "steps to "
_TAKEN = (
    "run", "record", "rank", "counts", "claim", "says", "value", "low", "high", "null", "p", "stands", "seeds",
    "verdict", "relation", "order", "median relative error", "slope", "r squared", "rank correlation", "count",
    "area", "final loss", "test loss", "steps taken", "comparable",
    *STATISTICS,
)  # fmt: skip

# Settings known only from events: if these do not give one, it is unknown, which does not count as a value.
_OF_EVENTS = ("granularity",)

# Of a sparsity: one that is computed, from those of the rounds say, is rounded in another way than one that is given.
_DECIMALS = 7

# Whole numbers, whatever type they were given in.
_COUNTED = ("rounds", "seed")

_FEW = 6  # labels in a sentence

# Settings that do not affect the network.
_OF_THE_RECORD = ("device", "root", "download", "curvature_every", "studies")


@remembered
def conditions(runs: Runs) -> pd.DataFrame:
    """The conditions of each run, one row per run: columns model, data, measure, rounds, sparsity, seed.

    Runs that agree in all columns but ``measure`` differ in nothing else: a seed is one initialisation and one order of
    the data, and on one machine the first pruning starts from the same network, to the bit. ``sparsity`` is the one
    asked for. A run that was not pruned has measure "none", 0 rounds and sparsity 0.

    For your own loops these are what ``Recorder(attributes=...)`` was given under these names; what it was not told
    about the pruning is taken from the events. If it was told neither model, data nor measure, the label stands in for
    the measure, model and data are "", rounds 0 and sparsity NaN.

    Any other setting that differs between runs of one model and data set has its own column after these, NaN where a
    run does not have it. A run that lacks a setting differs from those that have it, with two exceptions: runs that
    were not pruned, if only pruned ones have it; and experiments of a version that did not know it. Instrumented loops
    with the same settings and the same seed are told apart by their labels, in a column ``record``.

    Raises:
        ValueError: no runs were given, or two experiments are the same, so that their values would count twice.
    """
    check_runs(runs)
    rows = pd.DataFrame([_row(label, run) for label, run in runs.items()], index=pd.Index(runs, name="run"))
    others = [name for name in rows if name not in COMPARED_BY]
    rows[others] = rows[others].apply(_of_one_kind)
    if other := [name for name in others if name in _TAKEN or name.endswith(_PERCENT) or name.startswith(_STEPS_TO)]:
        rows = rows.rename(columns={name: f"{name} (setting)" for name in other})
        others = [f"{name} (setting)" if name in other else name for name in others]
    _tell_apart(rows, runs, others)
    others = [name for name in rows if name not in COMPARED_BY and rows[name].nunique(dropna=False) > 1]
    own = pd.Series([not experiment(run) for run in runs.values()], index=rows.index)
    return rows[[*COMPARED_BY, *(name for name in others if _varies(rows, name, own))]]


def comparisons(runs: Runs) -> pd.DataFrame:
    """The runs as they are compared, in order, one row each: column ``run`` and those of :func:`conditions`.

    Runs of one model, data set, rounds and sparsity form a comparison. Runs of that model and data set that were not
    pruned belong to each: their rows are repeated in it, with its rounds and sparsity. They are also repeated for every
    value of a setting that all pruned runs have and they lack; if some pruned runs lack it, they go with those.
    """
    table = conditions(runs).reset_index()
    pruned, whole = table[table.measure != "none"], table[table.measure == "none"]
    where = compared_by(table)
    repeated = _repeated(whole, pruned[where].drop_duplicates())
    alone = whole[~whole.run.isin(repeated.run)]
    order = [*MEASURES, *(name for name in table.measure if name not in MEASURES)]
    found = pd.concat([part for part in (pruned, repeated, alone) if len(part)])[table.columns]
    rank = found.measure.map(order.index)
    return found.assign(rank=rank).sort_values([*where, "rank", "seed"], ignore_index=True).drop(columns="rank")


def by_setting(runs: Runs) -> dict[str, xr.DataTree]:
    """Runs of one measure, with their most varied setting in place of the measure, such as ``learning rate 0.1``.

    So runs with several learning rates, say, are compared as runs of several measures are. Runs of several measures are
    returned unchanged, and so are runs that differ in no setting other than those known from events.
    """
    table = conditions(runs)
    settings = [name for name in table if name not in (*COMPARED_BY, *_OF_EVENTS, "record")]
    if table.measure.nunique() > 1 or not settings:
        return dict(runs)
    name = table[settings].nunique(dropna=False).idxmax()
    said = name.removesuffix(" (setting)").replace("_", " ")
    table = table.assign(measure=f"{said} " + told_apart(table[name]).fillna(MISSING)).sort_values(name)
    kept = table.drop(columns=[name])
    return {label: _saying(runs[label], row.dropna().to_dict(), replaced=name) for label, row in kept.iterrows()}


def _saying(run: xr.DataTree, said: dict, *, replaced: str) -> xr.DataTree:
    """A copy of a run that says these settings of itself; an experiment still has its number of epochs and protocol."""
    found, settings = run.copy(deep=False), experiment(run)
    if settings:
        planned = {"epochs": settings["epochs"]} if "epochs" in settings and replaced != "epochs" else {}
        found.attrs = said | run.attrs | {"experiment": json.dumps(said | planned)}
    else:
        found.attrs = {name: value for name, value in run.attrs.items() if name in ORIGIN} | said
    return found


def first_comparison(runs: Runs) -> pd.DataFrame:
    """The rows of the first of :func:`comparisons` with a pruned network; if none has one, of the first."""
    table = comparisons(runs)
    groups = [group for _, group in table.groupby(compared_by(table), dropna=False)]
    return next((group for group in groups if (group.measure != "none").any()), groups[0])


def mean_by_measure(runs: Runs, values: Mapping[str, float], *, of_seeds: str = "mean") -> pd.Series:
    """Mean of each run's value by measure: over seeds, then over the conditions in which most measures have one.

    Over seeds it may be the ``"median"`` instead. A measure that lacks a condition is not compared by the others'.
    """
    table = comparisons({label: runs[label] for label in values})
    found = table.run.map(dict(values)).groupby(
        [table[name] for name in (*compared_by(table), "measure")], dropna=False
    )
    wide = found.agg(lambda seeds: getattr(seeds, of_seeds)(skipna=False)).unstack("measure")
    counts = wide.notna().sum(axis=1)
    whole = wide[counts == counts.max()].dropna(axis=1).mean()
    return whole.reindex([name for name in table.measure.unique() if name in whole])


def several_seeds(runs: Runs) -> bool:
    """Whether some runs differ in nothing but their seed, so that they are to be read over seeds."""
    table = conditions(runs)
    return bool(table.duplicated([name for name in table if name != "seed"]).any())


def compared_by(table: pd.DataFrame) -> list[str]:
    """The columns of a table of conditions in which all runs of a comparison agree."""
    return [name for name in table if name not in ("run", "measure", "seed")]


def _varies(rows: pd.DataFrame, name: str, own: pd.Series) -> bool:
    """Whether runs of one model and data set that depend on the setting differ in it; ``own``: of a user's own loop."""
    whole = rows.measure == "none"
    of_whole = rows[name].notna().where(whole, False).groupby([rows.model, rows["data"]]).transform("any")
    depends = rows[name].notna() | ((~whole | of_whole) & own & (name not in _OF_EVENTS))
    return bool(rows[depends].groupby(["model", "data"])[name].nunique(dropna=False).gt(1).any())


def _repeated(whole: pd.DataFrame, pruned: pd.DataFrame) -> pd.DataFrame:
    """The rows of unpruned runs, repeated in each condition of pruned runs that they belong to."""
    own = [name for name in pruned if name not in PRUNING_SETTINGS]
    found = [whole.iloc[:0]]
    for number, row in whole.reset_index(drop=True).iterrows():
        there = pruned[(pruned.model == row.model) & (pruned.data == row["data"])]
        on = [name for name in own if pd.notna(row[name]) or there[name].isna().any()]
        found.append(whole.iloc[[number]][["run", "measure", "seed", *on]].merge(there, on=on))
    return pd.concat([rows for rows in found if len(rows)] or found)


def _tell_apart(rows: pd.DataFrame, runs: Runs, others: list[str]) -> None:
    """Give instrumented loops with the same settings a column ``record`` with their labels.

    Raises:
        ValueError: two experiments are the same, so that their values would count twice.
    """
    twice = rows[rows.duplicated([*COMPARED_BY, *others], keep=False)]
    refuse_as_same([label for label in twice.index if experiment(runs[label])])
    if len(twice):
        rows["record"] = pd.Series(twice.index, index=twice.index)


def alike(runs: Runs) -> str:
    """A sentence on the instrumented loops that have all settings and the seed of another; "" if none has."""
    table = conditions(runs)
    labels = [str(label) for label in table.index[table["record"].notna()]] if "record" in table else []
    if not labels:
        return ""
    few = ", ".join(labels[:_FEW]) + (", …" if len(labels) > _FEW else "")
    return (
        f"{len(labels)} runs have the seed and all settings of another, so they are told apart by their labels, as "
        f"record, and not averaged: {few}. If they are repetitions, give each its seed: "
        'Recorder(..., attributes={"seed": ...}), or run.attrs["seed"] = ... once it is opened.'
    )


def refuse_as_same(labels: Collection[str]) -> None:
    """Raise ValueError if there are any ``labels`` of runs that are the same: their values would count twice."""
    if len(labels):
        same = ", ".join(map(str, labels))
        raise ValueError(f"give one run of each measure, seed and condition; these have the same: {same}")


def _row(label: str, run: xr.DataTree) -> dict:
    settings = experiment(run) or _said(label, run)
    row = {name: value for name, value in settings.items() if name not in _OF_THE_RECORD}
    if row["measure"] == "none":
        row = {name: value for name, value in row.items() if name not in PRUNING_SETTINGS} | {
            "rounds": 0,
            "sparsity": 0.0,
        }
    row |= {name: int(row[name]) for name in _COUNTED if float(row[name]).is_integer()}
    row["sparsity"] = round(row["sparsity"], _DECIMALS)
    return {name: _comparable(value) for name, value in row.items()}


def _comparable(value: object) -> object:
    """A hashable form of a value: a tuple for a list, JSON text for anything nested."""
    nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, list | dict) for one in value))
    return json.dumps(value) if nested else tuple(value) if isinstance(value, list) else value


def _of_one_kind(values: pd.Series) -> pd.Series:
    """Settings unchanged if pandas can sort them, else as text; it sorts lists only if no run lacks one."""
    kinds = {str if isinstance(value, str) else type(value) if isinstance(value, tuple) else float
             for value in values.dropna()}  # fmt: skip
    ordered = len(kinds) < 2 and not (tuple in kinds and values.hasnans)
    return values if ordered else values.map(str, na_action="ignore")


def _said(label: str, run: xr.DataTree) -> dict:
    """Settings of an instrumented loop: its attributes and, about pruning, its events."""
    said = {str(name): value for name, value in run.attrs.items() if name not in ORIGIN and value is not None}
    said = {name: value for name, value in said.items() if isinstance(value, COMPARED_BY.get(name, object))}
    unknown = {"model": "", "data": "", "measure": label, "rounds": 0, "sparsity": float("nan"), "seed": 0}
    if not said.keys() & {"model", "data", "measure"}:
        return unknown | {name: value for name, value in said.items() if name == "seed"}
    return unknown | _pruned(run) | said


def _pruned(run: xr.DataTree) -> dict:
    """Measure, rounds and sparsity according to the run's prunings; measure "none" if there are none."""
    if not len(chosen := prunings(run)):
        return {"measure": "none"}
    pruned = run["pruning"].to_dataset().isel(event=chosen)
    found: dict[str, Any] = {"rounds": pruned.sizes["event"]}
    for name in ("measure", "granularity"):
        if name in pruned and len(said := set(pruned[name].values.tolist())) == 1:
            found[name] = said.pop()
    if "target" in pruned:
        found["sparsity"] = compounded(pruned, "target")
    return found
