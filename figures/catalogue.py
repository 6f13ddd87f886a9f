"""All figures by name: how each is drawn, the claim it shows, how to read it, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap
from typing import NamedTuple

from matplotlib.figure import Figure

from analysis import MissingQuantityError, comparison_findings, findings, pruning_findings
from analysis.conditions import by_setting, conditions
from analysis.given import in_a_line
from analysis.record import columns, has
from analysis.runs import Runs

from . import claims, comparison, pruning, steps
from .room import settle
from .style import theme


class Entry(NamedTuple):
    """The function that draws a figure, whose docstring opens with its claim, and the one that states the finding."""

    draw: Callable[[Runs], Figure]
    finding: Callable[[Runs], str]

    def __repr__(self) -> str:
        return f"<{self.draw.__name__}: {claim(self.draw.__name__)}>"


FIGURES: dict[str, Entry] = {
    entry.draw.__name__: entry
    for entry in starmap(Entry, (
        (steps.loss_decrease_scatter, findings.loss_prediction),
        (steps.loss_decrease_over_time, findings.loss_over_time),
        (steps.norm_rate, findings.norm_prediction),
        (comparison.norms, comparison_findings.norm_growth),
        (steps.quantities_per_layer, findings.layer_spread),
        (comparison.training_curves, findings.final_accuracy),
        (comparison.accuracy, findings.final_accuracy),
        (comparison.convergence, comparison_findings.fastest),
        (comparison.filters_left, findings.layer_choice),
        (pruning.pruning_effect, findings.effect_prediction),
        (comparison.loss_and_gradient_at_pruning, comparison_findings.moved_at_pruning),
        (pruning.pruning_effect_per_layer, pruning_findings.layers_moved),
        (pruning.removed_decrease, pruning_findings.decrease_removed),
        (pruning.removal_curve, pruning_findings.curve_errors),
        (pruning.measure_agreement, pruning_findings.measures_agree),
        (pruning.scale_invariance, pruning_findings.filters_invariant),
        (comparison.stability, findings.time_unstable),
        (claims.claims, comparison_findings.verdicts),
    ))
}  # fmt: skip


def draw(name: str, runs: Runs) -> Figure:
    """Draw a figure by name, in thetadot's style.

    Runs of a single measure are compared by the setting in which they differ, if any, such as the learning rate.

    Raises:
        ValueError: there is no such figure, or no runs were given. MissingQuantityError: no run recorded what it needs.
    """
    entry, shown = _entry(name), by_setting(runs)
    with theme(_measures(shown)):
        drawn = entry.draw(shown)
        settle(drawn)
    return drawn


def claim(name: str) -> str:
    """The claim that a figure shows: the first line of its docstring."""
    return _entry(name).draw.__doc__.strip().splitlines()[0]


def compares(name: str) -> bool:
    """Whether a figure compares measures, so that its claim is about several."""
    return _entry(name).draw.__module__ == comparison.__name__


def caption(name: str) -> str:
    """How to read a figure: the rest of its docstring."""
    return " ".join(_entry(name).draw.__doc__.split("\n", 1)[1].split())


def finding(name: str, runs: Runs) -> str:
    """What was found, in a sentence; "" if that needs more than the figure does."""
    try:
        return _entry(name).finding(runs)
    except MissingQuantityError:
        return ""


def _measures(runs: Runs) -> list[str]:
    """The measures by which the runs were pruned, then those that the runs compared."""
    compared = [
        columns(run, "scores", ["measure"]).measure.values.tolist() for run in runs.values() if has(run, "scores")
    ]
    return list(dict.fromkeys([*conditions(runs).measure, *(name for names in compared for name in names)]))


def _entry(name: str) -> Entry:
    if not isinstance(name, str) or name not in FIGURES:
        raise ValueError(f"unknown figure {in_a_line(name)}: choose one of {', '.join(FIGURES)}")
    return FIGURES[name]
