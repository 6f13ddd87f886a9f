"""How well a prediction agrees with its measurement, in four numbers."""

from __future__ import annotations

import numpy as np
import scipy  # scipy.stats is loaded on first use
import xarray as xr

from dynamics.schema import QUANTITIES

from .effect import effect_of_prunings
from .given import check_prediction
from .loss import loss_decrease
from .norm import network_norm_rate
from .prunings import prunings
from .record import MissingQuantityError

ORDERS = ("first_order", "second_order")


def residuals(prediction: xr.Dataset) -> xr.Dataset:
    """Measured − predicted, for each order: variables ``first_order`` and ``second_order`` in the prediction's dims.

    Raises:
        ValueError: this is no prediction but, for example, a record.
    """
    check_prediction(prediction)
    return xr.Dataset({order: prediction.measured - prediction[order] for order in ORDERS})


def agree(prediction: xr.Dataset) -> xr.Dataset:
    """Summary of a dataset with ``measured`` and predictions of first and second order, over all its dims.

    Over the new dim ``order``, from the n pairs where both are finite:

    =====================  =======================================================
    median_relative_error  median of |predicted − measured| / |measured|
    slope                  least-squares slope of measured on predicted; 1 is right
    r_squared              1 − Σ(measured − predicted)² / Σ(measured − mean)²; 1 is perfect, below 0 worse than the mean
    rank_correlation       Spearman's ρ of predicted and measured
    count                  n
    =====================  =======================================================

    A number for which n is too small is NaN.

    Raises:
        ValueError: this is no such dataset but, for example, a record.
    """
    check_prediction(prediction)
    rows = [_figures(prediction.measured.values, prediction[order].values) for order in ORDERS]
    names = ("median_relative_error", "slope", "r_squared", "rank_correlation", "count")
    columns = zip(*rows, strict=True)
    return xr.Dataset(
        {name: ("order", np.array(values)) for name, values in zip(names, columns, strict=True)},
        coords={"order": list(ORDERS)},
    )


def agreement(run: xr.DataTree) -> xr.Dataset:
    """Theory against measurement in one run: :func:`agree` for every relation that the record allows.

    Dims (relation, order). Relations: "loss decrease" of a step; "norm rate" of the whole network, averaged over
    windows of a twentieth of the run but at least ten steps; "effect of pruning" on the loss, ‖g‖², d‖θ‖²/dt and θᵀHg,
    or, for a run without prunings, "effect of events" on them.

    Raises:
        MissingQuantityError: the record allows none of them.
    """
    relations: dict[str, xr.Dataset] = {}
    reasons = []
    for predicted in (
        lambda run: {"loss decrease": loss_decrease(run)},
        lambda run: {"norm rate": network_norm_rate(run)},
        _effects,
    ):
        try:
            relations |= {name: agree(prediction) for name, prediction in predicted(run).items()}
        except MissingQuantityError as error:
            reasons.append(error)
    if not relations:
        raise reasons[0]
    return xr.concat(relations.values(), xr.Variable("relation", list(relations)))


def _effects(run: xr.DataTree) -> dict[str, xr.Dataset]:
    effect = effect_of_prunings(run)
    symbols = {name: QUANTITIES[name].symbol for name in effect.quantity.values.tolist()} | {"loss": "the loss"}
    what = "pruning" if len(prunings(run)) else "events"
    return {f"effect of {what} on {symbol}": effect.sel(quantity=name) for name, symbol in symbols.items()}


def _figures(measured: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float, float, int]:
    finite = np.isfinite(measured) & np.isfinite(predicted)
    measured, predicted = measured[finite].astype(float), predicted[finite].astype(float)
    count = len(measured)
    distinct = _rounded(predicted), _rounded(measured)
    varied = count > 2 and all(np.ptp(values) > 0 for values in distinct)
    nonzero = measured != 0
    error = np.abs(predicted - measured)[nonzero] / np.abs(measured[nonzero])
    return (
        float(np.median(error)) if error.size else np.nan,
        float(scipy.stats.linregress(predicted, measured).slope) if varied else np.nan,
        float(1 - np.sum((measured - predicted) ** 2) / np.sum((measured - measured.mean()) ** 2))
        if varied
        else np.nan,
        float(scipy.stats.spearmanr(*distinct).statistic) if varied else np.nan,
        count,
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values rounded so that those which differ only by rounding, as overlapping windows' may, share one rank."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa, 12), exponent)
