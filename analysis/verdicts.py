"""What the seeds say of each claim: its statistic over seeds, with an interval and a verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .claims import CLAIMS, Claim
from .conditions import refuse_as_same
from .intervals import half_width, p_value, stand
from .remembered import remembered
from .run_statistics import statistics
from .runs import Runs
from .statistics import STATISTICS, log

# The columns in which a row gives its claim and condition.
JUDGED = ("value", "low", "high", "null", "p", "stands", "seeds", "verdict")

_NEGLIGIBLE = {"ratio": np.log(1.01), "difference": 0.001}
_ROUNDING = 1e-6  # accuracies that are closer differ in single precision only: this is one image in a million


@remembered
def claims(runs: Runs) -> pd.DataFrame:
    """Each claim of :data:`CLAIMS` under each condition (model, data, rounds, sparsity), with its verdict.

    Runs of one seed start from the same initialisation and see the same batches, so they are compared within each seed:
    ln a − mean ln b for ratios (``value`` is its exponential), or a − mean b for accuracies. ``low`` and ``high`` bound
    Student's 95% interval of its mean over seeds (:func:`analysis.intervals.half_width` says why Student's).

    ==============  ===================================================================
    supported       the interval lies on the side of ``null`` that the claim states
    contradicted    it lies on the other side
    negligible      it lies within 1% of ``null`` (0.1% of accuracy), on whichever side
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


def _judge(claim: Claim, values: pd.DataFrame) -> dict:
    """The claim's row, judged by ``values``: the statistics of one condition's runs, one row per seed and measure."""
    lacking = [name for name in (claim.measure, *claim.others) if name not in values.index.unique("measure")]
    whole = values if lacking else _of_whole_seeds(claim, values)
    effects = np.empty(0) if lacking else _effects(claim, whole[claim.statistic])
    mean = effects.mean() if len(effects) else np.nan
    half = half_width(effects)
    bounds = np.array([mean, mean - half, mean + half])
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
    elif _alike(whole) or (claim.compare == "difference" and np.ptp(effects) < _ROUNDING):  # the same number of images
        verdict, low, high, p = "no verdict (seeds do not differ)", np.nan, np.nan, np.nan
    elif low <= null <= high:
        verdict = "inconclusive"
    else:
        verdict = "supported" if (low > null) == (claim.expected > 0) else "contradicted"
    numbers = {"value": value, "low": low, "high": high, "null": null, "p": p}
    return numbers | {"seeds": len(effects), "verdict": verdict}


def _of_whole_seeds(claim: Claim, values: pd.DataFrame) -> pd.DataFrame:
    """All statistics of the claim's measures, in the seeds for which the claim's statistic of each is known."""
    wide = values.unstack().loc[:, (slice(None), [claim.measure, *claim.others])]
    return wide[np.isfinite(wide[claim.statistic]).all(axis=1)]


def _alike(whole: pd.DataFrame) -> bool:
    """Whether all seeds have the same runs, to the bit, as if a seed was named but not set; accuracies do not count."""
    told = whole.drop(columns="accuracy", level=0).dropna(axis=1, how="all")
    return not told.empty and bool(told.duplicated()[1:].all())


def _effects(claim: Claim, values: pd.DataFrame) -> np.ndarray:
    """The effect in each seed: ln a − mean ln b for ratios, a − mean b for differences."""
    chosen = values[[claim.measure, *claim.others]].to_numpy()
    scaled = log(chosen) if claim.compare == "ratio" else chosen
    return scaled[:, 0] - (scaled[:, 1:].mean(1) if claim.others else 0)
