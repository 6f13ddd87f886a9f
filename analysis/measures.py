"""How far importance measures agree about the filters of one network, and how noisy each of them is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from numbers import Real

import numpy as np
import scipy  # scipy.stats is loaded on first use
import xarray as xr

from dynamics.schema import HIGHEST_FIRST

from .record import columns

WHOLE = "all layers"

_NEEDS = ("score", "resampled_score", "layer")


def rank_agreement(run: xr.DataTree) -> xr.Dataset:
    """Spearman's rank correlation of every two measures over the filters, of the whole network and of each layer.

    ==================  ==================================================================================
    rank_correlation    of the two measures' scores on all batches: 1 where both would prune in the same order
    standard_error      its standard deviation over bootstrap samples of the batches, both on the same ones
    ==================  ==================================================================================

    Dims (layer, event, measure, other), where the first layer, "all layers", is the whole network. NaN where fewer than
    three filters are left, or a measure gives all of them the same score. For a measure that prunes its highest scores
    first (:data:`dynamics.schema.HIGHEST_FIRST`: GraSP), the negative scores are ranked.

    Raises:
        MissingQuantityError: no scores were added to an event.
    """
    scores = _lowest_first(columns(run, "scores", _NEEDS))
    layers = {WHOLE: np.full(scores.sizes["unit"], True)}
    layers |= {str(name): scores.layer.values == name for name in dict.fromkeys(scores.layer.values.tolist())}
    found = [
        _between_measures(scores.isel(unit=np.flatnonzero(chosen)), rank_correlations, "rank_correlation")
        for chosen in layers.values()
    ]
    return xr.concat(found, xr.Variable("layer", list(layers)))


def removed_overlap(run: xr.DataTree, *, share: float) -> xr.Dataset:
    """The share of the filters removed by one measure that another would remove, too.

    Each measure removes the ``share`` of the remaining filters with its lowest scores (its highest, if it prunes those:
    :data:`dynamics.schema.HIGHEST_FIRST`), whatever their layer; by chance, two measures would have ``share`` in
    common. Dims (event, measure, other): ``overlap``, and ``standard_error``, its standard deviation over bootstrap
    samples of the batches, with the same samples for both measures.

    Raises:
        MissingQuantityError: no scores were added to an event.
        ValueError: the share is not in (0, 1).
    """
    if not (isinstance(share, Real) and 0 < share < 1):
        raise ValueError(f"share must be in (0, 1), got {share!r}: 0.2 is about what one of five rounds removes")
    return _between_measures(_lowest_first(columns(run, "scores", _NEEDS)), partial(_overlaps, share=share), "overlap")


def score_noise(run: xr.DataTree) -> xr.Dataset:
    """How much each measure's scores depend on the batches they were taken from, by bootstrap over batches.

    ===============  ======================================================================================
    standard_error   of each filter's score: its standard deviation over the samples, (event, measure, unit)
    reliability      Spearman's ρ of a sample's scores with those of all batches, their mean, (event, measure)
    ===============  ======================================================================================

    A measure that looks at no data has standard error 0 and reliability 1.

    Raises:
        MissingQuantityError: no scores were added to an event.
    """
    scores = columns(run, "scores", _NEEDS)
    pair = xr.concat([scores.score, scores.resampled_score], "of", coords="minimal")
    correlation = _apply(pair.rename(measure="rank", of="measure"), rank_correlations).isel(measure=0, other=1)
    return xr.Dataset(
        {
            "standard_error": _standard_error(scores.resampled_score),
            "reliability": correlation.mean("draw").rename(rank="measure"),
        }
    )


def _lowest_first(scores: xr.Dataset) -> xr.Dataset:
    """The scores with signs chosen such that every measure prunes the lowest first."""
    sign = xr.where(scores.measure.isin(HIGHEST_FIRST), -1.0, 1.0)
    return scores.assign({name: sign * scores[name] for name in ("score", "resampled_score")})


def _between_measures(scores: xr.Dataset, compare: Callable[[np.ndarray], np.ndarray], name: str) -> xr.Dataset:
    """Compare all pairs of measures, on all batches and on each bootstrap sample, which give the standard error."""
    resampled = _apply(scores.resampled_score, compare)
    return xr.Dataset({name: _apply(scores.score, compare), "standard_error": _standard_error(resampled)})


def _standard_error(resampled: xr.DataArray) -> xr.DataArray:
    """The standard deviation over the draws; NaN where all draws are NaN."""
    with warnings.catch_warnings():  # numpy before 2.4 warns where all are NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        return resampled.std("draw", ddof=1)


def _apply(scores: xr.DataArray, compare: Callable[[np.ndarray], np.ndarray]) -> xr.DataArray:
    """Apply ``compare``, (measure, unit) → (measure, other), to the scores of the units that have them."""

    def of_those_scored(values: np.ndarray) -> np.ndarray:
        return compare(values[:, np.isfinite(values).all(0)])

    found = xr.apply_ufunc(
        of_those_scored, scores, input_core_dims=[["measure", "unit"]], output_core_dims=[["measure", "other"]],
        vectorize=True,
    )  # fmt: skip
    return found.assign_coords(other=scores.measure.values) if "measure" in scores.coords else found


def rank_correlations(scores: np.ndarray) -> np.ndarray:
    """Spearman's ρ of every two rows: the correlation of their ranks, where ties get their mean rank.

    It is NaN for rows of fewer than three values, and for a constant row.
    """
    if scores.shape[1] < 3:
        return np.full((len(scores), len(scores)), np.nan)
    with np.errstate(invalid="ignore"):
        return np.atleast_2d(np.corrcoef(scipy.stats.rankdata(scores, axis=1)))


def _overlaps(scores: np.ndarray, share: float) -> np.ndarray:
    """The fraction that the lowest ``share`` of every two rows have in common."""
    count = round(share * scores.shape[1])
    if not count:
        return np.full((len(scores), len(scores)), np.nan)
    lowest = np.zeros(scores.shape, int)
    np.put_along_axis(lowest, scores.argsort(1, kind="stable")[:, :count], 1, axis=1)
    return lowest @ lowest.T / count
