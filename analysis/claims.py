"""The claims of the paper's abstract as statistics over seeds, each with an interval and a verdict."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from .conditions import conditions, refuse_as_same
from .convergence import convergence
from .intervals import half_width, p_value, stand
from .names import name_of
from .progress import with_progress
from .record import MissingQuantityError, ended
from .remembered import remembered
from .runs import Runs
from .statistics import STATISTICS, log

_AGNOSTIC = ("loss_preservation", "gradient_norm_increase", "gradient_norm_preservation")
_NOT_FIRST_ORDER = ("magnitude", "gradient_norm_increase", "gradient_norm_preservation")
_NOT_INCREASE = ("magnitude", "loss_preservation", "loss_preservation_times_magnitude", "gradient_norm_preservation")

# What a row says of its claim and condition.
JUDGED = ("value", "low", "high", "null", "p", "stands", "seeds", "verdict")

_NEGLIGIBLE = {"ratio": np.log(1.01), "difference": 0.001}


@dataclass(frozen=True)
class Claim:
    """A claim as a comparison within each seed: one statistic of ``measure`` against its mean over ``others``.

    Args:
        name: its place in the abstract, (i) to (iii), and a letter.
        says: the claim, as far as this statistic can support it.
        statistic: name in :data:`analysis.statistics.STATISTICS`.
        measure: the importance measure that the claim is about.
        others: the measures it is compared with; without any, a ratio is compared with 1.
        expected: the sign of the effect that the claim states: +1 for more, −1 for less.
        compare: "ratio" to the others' geometric mean, whose null is 1, or "difference" from their mean, null 0.
        reason: why this statistic, and why these others.
        rounds: the only number of rounds that the claim is about, if there is just one.
    """

    name: str
    says: str
    statistic: str
    measure: str
    others: tuple[str, ...]
    expected: int
    compare: str
    reason: str
    rounds: int | None = None

    @property
    def definition(self) -> str:
        """What is compared with what, what the claim expects of it, and why."""
        others = " and ".join(", ".join(map(name_of, self.others)).rsplit(", ", 1))
        ratio = self.compare == "ratio"
        those = f"the {'geometric ' * ratio}mean over" if len(self.others) > 1 else "that of"
        against = f" {'divided by' if ratio else 'minus'} {those} {others}" * bool(others)
        side = f"{'above' if self.expected > 0 else 'below'} {1 if ratio else 0}"
        rounds = f" with {self.rounds} round of pruning" * bool(self.rounds)
        return f"{self.statistic} of {name_of(self.measure)}{against} is {side}{rounds}. {self.reason}"


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "i.a", "What magnitude pruning removes contributes less to reducing the loss than the average parameter",
            "decrease_per_parameter", "magnitude", (), -1, "ratio",
            "Along gradient flow, dL/dt = −‖g‖², to which parameter i contributes −gᵢ². Per parameter, as measures "
            "remove different numbers of parameters with the same number of filters; parameters at random give 1.",
        ),
        Claim(
            "i.b", "What magnitude pruning removes contributes less than the average parameters of the same layers",
            "decrease_within_layers", "magnitude", (), -1, "ratio",
            "The part of i.a that is due to the choice of filters: a measure that chose layers with small gradients, "
            "but arbitrary filters within them, would show in i.a alone.",
        ),
        *(
            Claim(
                name, f"What magnitude pruning removes contributes less than what {name_of(other)} removes",
                "decrease_per_parameter", "magnitude", (other,), -1, "ratio",
                'The abstract says "least", so each magnitude-agnostic measure is compared separately: they may differ '
                "by orders of magnitude in both directions, and their mean would describe none of them. Loss "
                "preservation × magnitude is not magnitude-agnostic.",
            )
            for name, other in zip(("i.c", "i.d", "i.e"), _AGNOSTIC, strict=True)
        ),
        Claim(
            "i.f", "Models converge faster when pruned by magnitude than by magnitude-agnostic measures",
            "training_area", "magnitude", _AGNOSTIC, -1, "ratio",
            "The area under the training curve after the last pruning needs no threshold and is known for every run. "
            "Within a seed, only runs that train for the same number of steps after it are compared (in a sweep, on "
            "the same batches). Recovery from the pruning is included.",
        ),
        Claim(
            "i.g", "Loss preservation × magnitude converges faster than loss preservation",
            "training_area", "loss_preservation_times_magnitude", ("loss_preservation",), -1, "ratio",
            "The paper's own measure, motivated by (i): the two differ only in the factor of magnitude.",
        ),
        Claim(
            "ii.a", "Loss preservation changes the loss less than measures of other orders",
            "loss_change", "loss_preservation", _NOT_FIRST_ORDER, -1, "ratio",
            "As its name says: its score, the sum |θg|, bounds the first-order change |gᵀδ| of the loss. A change is "
            "|ln(after/before)|, because a loss can grow without limit but fall only to zero. Measures of other orders "
            "are magnitude (0) and gradient norm (2); loss preservation × magnitude is of the same order.",
        ),
        Claim(
            "ii.b", "Loss preservation changes the velocity of the norm less than measures of other orders",
            "norm_rate_change", "loss_preservation", _NOT_FIRST_ORDER, -1, "ratio",
            "First-order dynamics are d‖θ‖²/dt = −2θᵀg; the measure keeps small what the removed parameters "
            "contributed to it. In training mode, θᵀg is 0 on filters that BatchNorm normalises, so they play no part.",
        ),
        Claim(
            "ii.c", "When pruning after one epoch, loss preservation gives better accuracy than magnitude",
            "accuracy", "loss_preservation", ("magnitude",), 1, "difference",
            '"Minimally trained" means one round: everything is pruned after the first epoch. "Appropriate" means '
            "better there than the measure that one would use without the paper. For more rounds, the claim says "
            "nothing.", 1,
        ),
        Claim(
            "iii.a", "Gradient-norm increase changes second-order dynamics more than other measures",
            "norm_acceleration_change", "gradient_norm_increase", _NOT_INCREASE, 1, "ratio",
            "Second-order dynamics are d²‖θ‖²/dt² = 2(‖g‖² + θᵀHg); the measure ranks by θᵀHg, with its sign. In "
            "training mode, θᵀHg is −‖g‖² on filters that BatchNorm normalises, so they play no part.",
        ),
        Claim(
            "iii.b", "Gradient-norm increase increases the gradient norm",
            "grad_sqnorm_ratio", "gradient_norm_increase", (), 1, "ratio",
            "‖g‖² of the parameters that stay, divided by ‖g‖² before: whether the measure keeps its first-order "
            "promise. In the paper's protocol, it scores the gradient of a loss at another temperature (200) than the "
            "probe's (5).",
        ),
        Claim(
            "iii.c", "Gradient-norm increase leaves a larger gradient norm than other measures",
            "grad_sqnorm_ratio", "gradient_norm_increase", _NOT_INCREASE, 1, "ratio",
            "Pruning many filters takes away their share of ‖g‖², whatever the measure; what is left is therefore "
            "compared.",
        ),
        Claim(
            "iii.d", "Gradient-norm preservation changes the gradient norm less than increase does",
            "grad_sqnorm_change", "gradient_norm_preservation", ("gradient_norm_increase",), -1, "ratio",
            "Both rank by θ(Hg): preservation without its sign, increase with it (at temperatures 1 and 200 in the "
            "paper's protocol). A change is |ln(after/before)|, because it may span orders of magnitude, up or down.",
        ),
        Claim(
            "iii.e", "Increasing the gradient norm gives worse models than other measures",
            "accuracy", "gradient_norm_increase", _NOT_INCREASE, -1, "difference",
            "The abstract says that this can happen, so one condition where it does is enough.",
        ),
        Claim(
            "iii.f", "Preserving the gradient norm gives better models than increasing it",
            "accuracy", "gradient_norm_preservation", ("gradient_norm_increase",), 1, "difference",
            "No interval can show that preserving does no harm, unless one defines how much counts as none; that it "
            "does less harm, an interval can show.",
        ),
    )
}  # fmt: skip


def statistics(runs: Runs) -> pd.DataFrame:
    """Every statistic of :data:`STATISTICS`, one row per run, after the columns of :func:`analysis.conditions`.

    NaN where a record lacks what a statistic needs, where the statistic is a change from zero (of a network that is
    already dead), and for runs that have not ended, whose outcome is not known. ``training_area`` is also NaN for runs
    that :func:`trained_unevenly`: the longer a run, the lower its mean loss.
    """
    table = conditions(runs)
    found = [_values(run) for run in with_progress(runs.values(), "claims")]
    table = table.join(pd.DataFrame(found, index=list(runs)))
    return table.assign(training_area=table.training_area.mask(trained_unevenly(runs)))


def trained_unevenly(runs: Runs) -> pd.Series:
    """Whether each run trained for another number of steps after its last pruning than most runs of its seed.

    Compared are the pruned runs of a condition and seed that ended and logged their loss; all of them are uneven where
    no number of steps is the most common.
    """
    table = conditions(runs)
    table = table[table.measure != "none"]
    steps = pd.Series({label: _steps_after_pruning(runs[label]) for label in table.index}, dtype=float)
    paired = [table[name] for name in table if name != "measure"]
    most = steps.groupby(paired, dropna=False).transform(_most)
    return (steps.notna() & (steps != most)).reindex(list(runs), fill_value=False)


def _most(values: pd.Series) -> float:
    """The value that is there most often; NaN where several are."""
    found = values.mode()
    return found[0] if len(found) == 1 else np.nan


def _steps_after_pruning(run: xr.DataTree) -> float:
    """How many steps there are after the last pruning; NaN where it is not known."""
    with suppress(MissingQuantityError):
        return convergence(run).attrs["steps"] if ended(run) else np.nan
    return np.nan


def claims(runs: Runs) -> pd.DataFrame:
    """Each claim of :data:`CLAIMS` under each condition (model, data, rounds, sparsity), with its verdict.

    Runs of one seed start from the same initialisation and see the same batches, so they are compared within each seed:
    ln a − mean ln b for ratios (``value`` is its exponential), or a − mean b for accuracies. ``low`` and ``high`` bound
    Student's 95 % interval of its mean over seeds (:func:`analysis.intervals.half_width` says why Student's).

    ==============  ===================================================================
    supported       the interval lies on the side of ``null`` that the claim states
    contradicted    it lies on the other side
    negligible      it lies within 1 % of ``null`` (0.1 % of accuracy), on whichever side
    inconclusive    it contains ``null`` and is wider than that
    no verdict ...  fewer than two seeds have ended runs of all the measures; or nothing shows how much seeds vary,
                    because all have the same runs, to the bit, or because accuracies, which are whole numbers of
                    images, differ by the same number in all of them; the reason follows
    ==============  ===================================================================

    Effects are negligible where every measure removes too much: if each leaves a network that answers at random, the
    changes of loss and gradient are as large as the loss and the gradient were, and equal to within rounding.

    Each interval is judged by itself: if a claim has nothing to it, one interval in twenty still gives a verdict by
    chance, half of these "supported". Count the conditions that agree before believing a claim; ``stands`` says which
    intervals exclude their null even after correction for the number of intervals in the table
    (:func:`analysis.intervals.stand`). Seeds vary the initialisation and the order of the data (and the choice of
    samples, where an experiment uses a part of them), not the data set or the settings.

    Columns: claim, says, the condition, any other setting that differs (:func:`analysis.conditions`), value, low, high,
    null, p (of Student's test of the null), stands, seeds, verdict.

    Raises:
        ValueError: two runs have the same measure, seed and condition.
    """
    return judged(statistics(runs))


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`claims` from the table of :func:`analysis.statistics`.

    Raises:
        ValueError: two runs have the same measure, seed and condition.
    """
    pruned = table[table.measure != "none"]
    where = [name for name in pruned if name not in (*STATISTICS, "measure", "seed")]
    refuse_as_same(pruned.index[pruned.duplicated([*where, "measure", "seed"], keep=False)])
    groups = [
        (dict(zip(where, condition, strict=True)), group.set_index(["seed", "measure"])[[*STATISTICS]])
        for condition, group in pruned.groupby(where, dropna=False)
    ]
    rows = [
        {"claim": claim.name, "says": claim.says} | condition | _judge(claim, values)
        for claim in CLAIMS.values()
        for condition, values in groups
        if claim.rounds in (None, condition["rounds"])
    ]
    found = pd.DataFrame(rows, columns=["claim", "says", *where, *JUDGED])
    return found.assign(stands=stand(found.p))


def as_claimed(found: pd.DataFrame) -> pd.DataFrame:
    """:func:`claims` with every effect turned so that it is above the null if it is as claimed.

    Where a claim says less, a ratio is inverted or a difference negated, and the bounds are swapped.
    """
    less = found.claim.map({name: claim.expected for name, claim in CLAIMS.items()}) < 0
    bounds = found[["value", "low", "high"]]
    turned = (
        (1 / bounds).where(found.null == 1, -bounds, axis=0)[["value", "high", "low"]].set_axis(bounds.columns, axis=1)
    )
    return found.assign(**bounds.mask(less, turned, axis=0))


@remembered
def _values(run: xr.DataTree) -> dict[str, float]:
    found = dict.fromkeys(STATISTICS, np.nan)
    for name, statistic in STATISTICS.items() if ended(run) else ():
        with suppress(MissingQuantityError):
            value = statistic(run)
            found[name] = value if np.isfinite(value) else np.nan
    return found


def _judge(claim: Claim, values: pd.DataFrame) -> dict:
    """The claim's row for the statistics of one condition's runs, a row a seed and measure."""
    lacking = [name for name in (claim.measure, *claim.others) if name not in values.index.unique("measure")]
    whole = values if lacking else _of_whole_seeds(claim, values)
    effects = np.empty(0) if lacking else _effects(claim, whole[claim.statistic])
    mean = effects.mean() if len(effects) else np.nan
    half = half_width(effects)
    bounds = mean, mean - half, mean + half
    p = p_value(effects)
    negligible = np.abs(bounds).max() <= _NEGLIGIBLE[claim.compare]
    value, low, high, null = (*np.exp(bounds), 1.0) if claim.compare == "ratio" else (*bounds, 0.0)
    if lacking:
        more = f" and {len(lacking) - 1} more" * (len(lacking) > 1)
        verdict = f"no verdict (no run of {lacking[0]}{more})"
    elif len(effects) < 2:
        verdict = "no verdict (1 seed)" if len(effects) else f"no verdict ({claim.statistic} not known)"
    elif negligible:
        verdict = "negligible"
    elif _alike(whole) or (claim.compare == "difference" and not np.ptp(effects)):  # of images, the same number
        verdict, low, high, p = "no verdict (seeds do not differ)", np.nan, np.nan, np.nan
    elif low <= null <= high:
        verdict = "inconclusive"
    else:
        verdict = "supported" if (low > null) == (claim.expected > 0) else "contradicted"
    numbers = {"value": value, "low": low, "high": high, "null": null, "p": p}
    return numbers | {"seeds": len(effects), "verdict": verdict}


def _of_whole_seeds(claim: Claim, values: pd.DataFrame) -> pd.DataFrame:
    """All statistics of the claim's measures, its own first, in the seeds that have its statistic of each."""
    wide = values.unstack().loc[:, (slice(None), [claim.measure, *claim.others])]
    return wide[np.isfinite(wide[claim.statistic]).all(axis=1)]


def _alike(whole: pd.DataFrame) -> bool:
    """Whether all seeds have the same runs, to the bit, as where a seed is said and not set; accuracies do not tell."""
    told = whole.drop(columns="accuracy", level=0).dropna(axis=1, how="all")
    return not told.empty and bool(told.duplicated()[1:].all())


def _effects(claim: Claim, values: pd.DataFrame) -> np.ndarray:
    """Of each seed: ln a − mean ln b of ratios, a − mean b of differences."""
    chosen = values[[claim.measure, *claim.others]].to_numpy()
    scaled = log(chosen) if claim.compare == "ratio" else chosen
    return scaled[:, 0] - (scaled[:, 1:].mean(1) if claim.others else 0)
