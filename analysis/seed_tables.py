"""Tables over seeds: measures side by side under each condition, and claims with their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from .claims import CLAIMS
from .conditions import MEASURES, compared_by, comparisons, conditions
from .convergence import SHARES, convergence, equally_long, last_pruning
from .given import check_claims
from .intervals import CONFIDENCE, half_width
from .names import name_of
from .outcome import outcome, pruned_units
from .progress import with_progress
from .prunings import prunings
from .record import MissingQuantityError, columns, ended, has
from .run_statistics import trained_unevenly
from .runs import Runs
from .tables import agreement_table
from .typeset import MISSING, told_apart
from .verdicts import JUDGED

_STEPS_TO = [f"steps to {share:.0%}" for share in SHARES]
_CONVERGENCE = ["area", "final loss", *_STEPS_TO, "steps taken"]
VERDICTS = ("supported", "contradicted", "negligible", "inconclusive", "no verdict")


def accuracy_table(runs: Runs) -> pd.DataFrame:
    """Test accuracy by model, data, rounds and measure: mean ± half of its 95% interval over seeds.

    If no run logged an accuracy, the test loss. If any run was pruned, also what pruning removed: filters or weights,
    parameters and multiply-adds, means over seeds. Runs that did not end, or whose accuracy is not a number, are left
    out and reported under ``seeds``.
    """
    table = comparisons(runs)
    found = {label: outcome(run) for label, run in with_progress(runs.items(), "accuracy") if ended(run)}
    same = compared_by(table)
    accuracy, loss = (any(np.isfinite(of[name]) for of in found.values()) for name in ("test_accuracy", "test_loss"))
    title, name, scale, digits = "test accuracy, %", "test_accuracy", 100, ".1f"
    if loss and not accuracy:
        title, name, scale, digits = "test loss", "test_loss", 1, ".3g"
    pruned = {
        f"{pruned_units(runs.values())} pruned, %": "sparsity",
        "parameters pruned, %": "removed_parameters",
        "multiply-adds pruned, %": "removed_multiply_adds",
    }
    pruned = pruned if any(len(prunings(run)) for run in runs.values()) else {}
    for column, of in ({title: name} | pruned).items():
        values = {label: float(came_to[of]) for label, came_to in found.items()}
        table[column] = table.run.map(values) * (scale if column == title else 100)
    cells = {title: partial(_mean, digits=digits, interval=True)}
    cells |= dict.fromkeys(pruned, partial(_mean, digits=".1f", interval=False))
    known = table[title].notna()
    return _over_seeds(table.assign(counts=table.run.isin(found) & (known | ~known.any())), same, cells)


def convergence_table(runs: Runs) -> pd.DataFrame:
    """:func:`analysis.convergence` by model, data, rounds and measure, from the last pruning on.

    Area and final loss: mean ± half of its 95% interval over seeds, of runs that took as many steps as most pruned ones
    of their condition; with the number of these, if not all did. Steps to a share of the first loss: median over seeds,
    with the number of runs that reached it if not all did. Networks that were not pruned start with the others.

    Raises:
        MissingQuantityError: no run that ended logged its loss after the last pruning.
    """
    table, same = convergences(runs)
    if table["steps taken"].isna().all():
        raise MissingQuantityError(
            "convergence needs runs that have ended, trained on after their last pruning, and logged their loss: "
            "recorder.log(loss=...)"
        )
    table["counts"] = np.isfinite(table.area)
    table[["area", "final loss"]] = table[["area", "final loss"]].where(table.comparable)
    cells = {title: partial(_mean, digits=".3g", interval=True) for title in ("area", "final loss")}
    return _over_seeds(table, same, cells | dict.fromkeys(_STEPS_TO, _median_steps))


def pruned_last(runs: Runs) -> str:
    """A sentence for :func:`convergence_table` on how many runs were pruned after their last step; "" if none was."""
    trained = [run for run in runs.values() if ended(run) and has(run, "steps")]
    last = [run for run in trained if last_pruning(run) > columns(run, "steps", ["step"]).step[-1]]
    if not last:
        return ""
    return (
        f"No step is recorded after the last pruning in {len(last)} of {len(runs)} runs. Their convergence, and that "
        "of the runs compared with them, is not known: train for at least one epoch more than there are rounds."
    )


def uneven(runs: Runs) -> str:
    """Sentences on how many runs trained for longer or shorter than those they are compared with; "" if none did."""
    table, _ = convergences(runs)
    of_condition = int((~table.comparable & table.area.notna()).sum())
    of_seed = int(trained_unevenly(runs).sum())
    said = ["Longer training lowers the mean loss after the last pruning, whatever the measure."]
    if of_condition:
        said.append(
            f"{of_condition} of {len(runs)} runs took another number of steps than most of their condition: no mean "
            "over seeds holds their areas and final losses."
        )
    if of_seed:
        said.append(
            f"{of_seed} of {len(runs)} runs took another number of steps than most of their seed: no claim compares "
            "their areas."
        )
    return " ".join(said) if len(said) > 1 else ""


def agreement_over_runs(runs: Runs) -> pd.DataFrame:
    """:func:`analysis.agreement_table` by relation, order, model and data: medians over that many runs.

    Over all measures, rounds, sparsities and seeds; of any other setting in which runs differ each value is by itself.
    Slope, R² and rank correlation are of those runs alone that have more than two points: a single pruning has none.
    ``count`` is the median of the numbers of points.
    """
    settings = conditions(runs).drop(columns=["measure", "rounds", "sparsity", "seed"])
    table = agreement_table(runs).reset_index().join(settings, on="run")
    groups = table.groupby(["relation", "order", *settings], sort=False, observed=True, dropna=False)
    medians = groups.median(numeric_only=True)
    medians["count"] = medians["count"].map("{:g}".format)
    counts = {"runs": groups.size(), "runs with > 2 points": groups["rank correlation"].count()}
    return _in_print(medians.assign(**counts))


def verdict_table(found: pd.DataFrame) -> pd.DataFrame:
    """From :func:`analysis.claims`: the number of conditions under which each claim has each verdict.

    The last column counts those whose mean over seeds lies on the side that the claim states, whatever its interval. A
    claim that is about none of the conditions has no row.

    Raises:
        ValueError: ``found`` is another table, or something else.
    """
    check_claims(found)
    rows = pd.MultiIndex.from_frame(found[["claim", "says"]].drop_duplicates())
    counts = pd.crosstab([found.claim, found.says], found.verdict.str.replace(r" \(.*", "", regex=True))
    counts = counts.reindex(index=rows, columns=VERDICTS, fill_value=0)
    side = np.sign(found.value - found.null) == found.claim.map({name: one.expected for name, one in CLAIMS.items()})
    counts["mean as claimed"] = side.groupby([found.claim, found.says]).sum().reindex(rows, fill_value=0)
    return counts.rename_axis(columns=None).rename_axis(["claim", "what it says"])


def lacking(found: pd.DataFrame, measures: Collection[str]) -> dict[str, list[str]]:
    """The measures that claims need but ``measures`` lacks, by the claim's name; ``found`` lists the claims."""
    needs = {name: (CLAIMS[name].measure, *CLAIMS[name].others) for name in found.claim.unique()}
    others = {
        name: [one for one in MEASURES if one in needed and one not in measures] for name, needed in needs.items()
    }
    return {name: named for name, named in others.items() if named}


def who_needs(measures: Mapping[str, list[str]]) -> str:
    """Which claims need which measures, in one phrase."""
    claims: dict[str, list[str]] = {}
    for claim, needed in measures.items():
        claims.setdefault(", ".join(map(name_of, needed)), []).append(claim)
    return "; ".join(f"{', '.join(of)} need{'s' * (len(of) == 1)} {needed}" for needed, of in claims.items())


def claims_table(found: pd.DataFrame) -> pd.DataFrame:
    """:func:`analysis.claims` in print: effect and interval, as a ratio or in points of accuracy.

    A star marks verdicts that stand after correction for the number of intervals.

    Raises:
        ValueError: ``found`` is another table, or something else.
    """
    check_claims(found)
    names = [name for name in found if name not in ("says", *JUDGED)]
    printed = found.set_index(_telling(found, names))
    printed["effect"] = [_effect(row) for row in found.itertuples()]
    printed["verdict"] += [" *" * stands for stands in found.stands]
    return _in_print(printed[["effect", "seeds", "verdict"]])


def chance(found: pd.DataFrame) -> str:
    """Two sentences: how many verdicts chance alone would give, and how many stand after correction for that."""
    count = found.p.count()
    return (
        f"If there were no effects at all, about {(1 - CONFIDENCE) * count:.1f} of {count} intervals would give a "
        f"verdict by chance. Corrected for their number (false discovery rate {1 - CONFIDENCE:.0%}, Benjamini and "
        f"Hochberg 1995), {found.stands.sum()} of them stand, marked with a star."
    )


def convergences(runs: Runs) -> tuple[pd.DataFrame, list[str]]:
    """Convergence of the rows of :func:`analysis.comparisons` from their condition's last pruning on, and its columns.

    ``comparable``: whether it took as many steps as most pruned runs of the condition, or as most if none was pruned.
    """
    table = comparisons(runs)
    same = compared_by(table)
    condition = [table[name] for name in same]
    since = pd.Series([last_pruning(runs[label]) for label in table.run])
    since = since.groupby(condition, dropna=False).transform("max")
    each = with_progress([*zip(table.run, since, strict=True)], "convergence")
    found = [_convergence(runs[label], start) for label, start in each]
    table = table.join(pd.DataFrame(found, index=table.index, columns=_CONVERGENCE, dtype=float))
    of = table.groupby(condition, dropna=False)["steps taken"]
    even = of.transform(lambda steps: equally_long(steps, pruned=table.measure[steps.index] != "none"))
    return table.assign(comparable=even.astype(bool)), same


def _over_seeds(table: pd.DataFrame, same: list[str], cells: Mapping[str, Callable[[pd.Series], str]]) -> pd.DataFrame:
    """One row per comparison and measure; each cell is computed from its column, over the runs that count."""
    by = [*_telling(table, same), "measure"]
    keys, rows = [], []
    for key, group in table.groupby(by, sort=False, dropna=False):
        counted = group[group.counts]
        seeds = str(len(group)) if len(counted) == len(group) else f"{len(counted)} of {len(group)}"
        keys.append(key)
        rows.append({title: cell(counted[title]) for title, cell in cells.items()} | {"seeds": seeds})
    return _in_print(pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(keys, names=by)))


def _convergence(run: xr.DataTree, since: int) -> dict[str, float]:
    """What ``_CONVERGENCE`` names, of one run; nothing if it did not end or logged no loss."""
    if not ended(run):
        return {}
    try:
        found = convergence(run, since=since)
    except MissingQuantityError:
        return {}
    steps = [float(found.steps_to_loss.sel(share=share)) for share in SHARES]
    values = [float(found.area), float(found.final_loss), *steps, found.attrs["steps"]]
    return dict(zip(_CONVERGENCE, values, strict=True))


def _mean(values: pd.Series, *, digits: str, interval: bool) -> str:
    if not values.notna().any():
        return MISSING
    known = values.dropna()
    half = half_width(known) if interval else np.nan
    said = f"{known.mean():{digits}}" + (f" ± {half:{digits}}" if np.isfinite(half) else "")
    return said if len(known) == len(values) else f"{said} ({len(known)} of {len(values)})"


def _median_steps(values: pd.Series) -> str:
    if not values.notna().any():
        return MISSING
    reached = int(np.isfinite(values).sum())
    said = f"{values.median():.0f}" if np.isfinite(values.median()) else "not reached"
    return said if reached in (0, len(values)) else f"{said} ({reached} of {len(values)})"


def _effect(row: Any) -> str:
    if np.isnan(row.value):
        return MISSING
    value, low, high = (_beside_null(number, row.null) for number in (row.value, row.low, row.high))
    return (value if np.isnan(row.low) else f"{value} [{low}, {high}]") + ("" if row.null else " points")


def _beside_null(number: float, null: float) -> str:
    """A ratio, or a difference in points, with two extra digits at most where it would else print as ``null``."""
    scale, first, kind = (1, 3, "g") if null else (100, 2, "f")
    texts = [f"{scale * number:{'' if null else '+'}.{digits}{kind}}" for digits in range(first, first + 3)]
    return next((text for text in texts if float(text) != null), texts[0])


def _in_print(table: pd.DataFrame) -> pd.DataFrame:
    """The table with printed names of models, data sets and measures, and of settings that only some runs have."""
    for level in table.index.names:
        values = table.index.get_level_values(level)
        if values.hasnans:
            printed = dict(zip(values, told_apart(values.to_series()), strict=True))
            table = table.rename(index=lambda one, of=printed: MISSING if pd.isna(one) else of[one], level=level)
    for level in {"model", "data", "measure"} & set(table.index.names):
        table = table.rename(index=name_of, level=level)
    return table


def _telling(table: pd.DataFrame, names: list[str]) -> list[str]:
    """The columns that distinguish rows: no sparsity if all pruned networks share it, no rounds if none says any."""
    pruned = table[table.measure != "none"] if "measure" in table else table
    alike = {"sparsity"} if "sparsity" in names and pruned.sparsity.nunique(dropna=False) < 2 else set()
    alike |= {"rounds"} if "rounds" in names and not table.rounds.any() else set()
    return [name for name in names if name not in alike]
