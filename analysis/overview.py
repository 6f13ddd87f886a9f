"""Everything that ``python -m analysis`` prints: one row per run, or over seeds where there are several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pandas as pd

from . import seed_tables
from .claims import CLAIMS
from .condition_names import probe_mode
from .conditions import alike, conditions, several_seeds
from .findings import diverged
from .record import MissingQuantityError, check_begun
from .remembered import remembering
from .runs import Runs
from .statistics import STATISTICS
from .tables import agreement_table, brief_table, outcome_table
from .typeset import MISSING
from .verdicts import claims

Part: TypeAlias = pd.DataFrame | list[str]
Parts = dict[str, Part]

_OUTCOME = "Outcome of the runs"
_UNTESTED = "No test results were logged: call recorder.log_epoch(test_accuracy=..., test_loss=...) after each epoch."
_ACCURACY = "Accuracy: mean ± half of its 95% interval over seeds"
_TEST_LOSS = "Test loss: mean ± half of its 95% interval over seeds"
_CONVERGENCE = (
    "Convergence after the last pruning: training loss, mean ± half of its 95% interval over seeds; steps to a share "
    "of the first loss, median over seeds (and how many runs reached it)"
)
_AGREEMENT = "Theory against measurement: medians over runs"
_READING = "How to read theory against measurement"
_READ = (
    "Each row is based on as many steps, windows of steps or prunings as its count says. Read the medians: a single "
    "step beyond the reach of the expansion, such as the first at a high learning rate, decides slope and R²; if it is "
    "the only one measured, it decides everything."
)
_PROBES = "How prunings were measured"
_VERDICTS = "Claims: number of conditions by verdict"
_LACKING = "Claims without a verdict: the measures that they need and no run has"
_DIVERGED = "Runs that diverged"
_ALIKE = "Runs with the same settings and seed"
SUMMARY = (_DIVERGED, _ALIKE, _OUTCOME, _ACCURACY, _TEST_LOSS, _VERDICTS, _LACKING)  # first in a report


@remembering()
def overview(runs: Runs, *, brief: bool = False) -> Parts:
    """Tables by title, and the claims with their definitions if there are several seeds to judge them by.

    Raises:
        MissingQuantityError: the runs recorded nothing.
    """
    check_begun(*runs.values())
    lost: Parts = {_DIVERGED: those} if (those := diverged(runs)) else {}
    lost |= {_ALIKE: [said]} if (said := alike(runs)) else {}
    if not several_seeds(runs):
        return lost | _of_runs(runs, brief)
    reached = seed_tables.accuracy_table(runs)
    outcome = lost | {_TEST_LOSS if "test loss" in reached else _ACCURACY: reached}
    return outcome | (_of_claims(runs, brief) if brief else _of_seeds(runs))


def _of_runs(runs: Runs, brief: bool) -> Parts:
    if brief:
        return {"Outcome of the runs, and median errors of the predictions": brief_table(runs)}
    outcome = outcome_table(runs)
    came_to: Part = [_UNTESTED] if (outcome == MISSING).all(axis=None) else outcome
    return {_OUTCOME: came_to} | _agreement("Theory against measurement", agreement_table, runs)


def _agreement(title: str, table: Callable[[Runs], pd.DataFrame], runs: Runs) -> Parts:
    """The table of agreement and how to read it, or the reason why there is none."""
    found = _or_why_not(table, runs)
    return {title: found} | ({_READING: [_READ]} if isinstance(found, pd.DataFrame) else {})


def _or_why_not(table: Callable[[Runs], pd.DataFrame], runs: Runs) -> Part:
    """A table, or the reason, as a sentence, if the runs recorded too little for it."""
    try:
        return table(runs)
    except MissingQuantityError as error:
        return [str(error)]


def _of_seeds(runs: Runs) -> Parts:
    return (
        {_CONVERGENCE: _or_why_not(seed_tables.convergence_table, runs)}
        | ({"Runs that end with a pruning": [said]} if (said := seed_tables.pruned_last(runs)) else {})
        | ({"Runs that trained for different numbers of steps": [said]} if (said := seed_tables.uneven(runs)) else {})
        | _agreement(_AGREEMENT, seed_tables.agreement_over_runs, runs)
        | _of_claims(runs, brief=False)
    )


def _of_claims(runs: Runs, brief: bool) -> Parts:
    found = claims(runs)
    if found.empty:  # nothing was pruned
        return {}
    unknown = seed_tables.lacking(found, set(conditions(runs).measure))
    known = found[~found.claim.isin(unknown)]
    counts: Parts = {_PROBES: [said]} if (said := probe_mode(runs)) else {}
    counts |= {} if known.empty else {_VERDICTS: seed_tables.verdict_table(known)}
    counts |= {_LACKING: [seed_tables.who_needs(unknown)]} if unknown else {}
    if brief or known.empty:
        return counts
    return counts | {
        "Claims: effect with its 95% interval over seeds": seed_tables.claims_table(known),
        "What the claims compare, and why": [
            *(f"{name}: {claim.definition}" for name, claim in CLAIMS.items()),
            seed_tables.chance(found),
        ],
        "Statistics that are compared": [f"{name}: {of.__doc__.splitlines()[0]}" for name, of in STATISTICS.items()],
    }
