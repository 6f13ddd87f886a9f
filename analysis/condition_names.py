"""The conditions of runs in print: what the runs of a comparison have in common, and how they were measured."""

from __future__ import annotations

import pandas as pd

from dynamics.words import counted

from .conditions import compared_by
from .names import names_of
from .prunings import prunings
from .record import columns, has
from .runs import Runs
from .typeset import percentages, told_apart

_MODES = {
    "train": "training mode, where BatchNorm normalises by the batch",
    "eval": "eval mode, where BatchNorm normalises by its running statistics",
}


def by_condition(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of :func:`comparisons` by their condition in print: ``VGG-13, digits, 70% pruned in 5 rounds``."""
    names = names_of_conditions(table)
    return dict(iter(table.groupby(names, sort=False)))


def names_of_conditions(table: pd.DataFrame) -> pd.Series:
    """The printed name of each row's condition: what the runs of its comparison have in common.

    Conditions that would share a name are numbered.
    """
    by = compared_by(table)
    settings = table[by].drop(columns=["model", "data", "rounds", "sparsity"])
    printed = {name: told_apart(settings[name]) for name in settings} | {"sparsity": percentages(table.sparsity)}
    printed |= {name: table[name].map(names_of(table[name].unique())) for name in ("model", "data")}
    names = table[by].assign(**printed).apply(_in_print, axis=1)
    condition = table.groupby(by, dropna=False, sort=False).ngroup()
    number = condition.groupby(names).transform(lambda alike: pd.factorize(alike)[0])
    return names.where(number == 0, names + " (" + (number + 1).astype(str) + ")")


def _in_print(condition: pd.Series) -> str:
    model, data, rounds, sparsity = (condition[name] for name in ("model", "data", "rounds", "sparsity"))
    extent = "" if pd.isna(sparsity) else f"{sparsity}% "
    once = f"{extent}pruned" if extent and float(sparsity) else ""  # in an unknown number of rounds
    pruned = f"{extent}pruned in {counted(rounds, 'round')}" if rounds else once
    others = condition.drop(["model", "data", "rounds", "sparsity"]).dropna()
    settings = (f"{name.replace('_', ' ')} {value}" for name, value in others.items())
    parts = [model, data, pruned, *settings]
    return ", ".join(part for part in parts if part)


def probe_mode(runs: Runs) -> str:
    """The mode in which the prunings were measured, as a sentence; "" if nothing was pruned."""
    pruned = [run for run in runs.values() if has(run, "pruning", "mode")]
    modes = {str(mode) for run in pruned for mode in columns(run, "pruning", ["mode"])["mode"].values[prunings(run)]}
    said = [_MODES[mode] for mode in _MODES if mode in modes]
    return f"Prunings were measured in {' or in '.join(said)}." if said else ""
