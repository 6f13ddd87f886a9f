"""The outcome of one run, in the dimensionless numbers that the paper's claims are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from .convergence import convergence
from .effect import removed_decrease
from .protocol import epoch_that_counts
from .prunings import at_prunings

_Values = TypeVar("_Values", np.ndarray, xr.DataArray)


def decrease_per_parameter(run: xr.DataTree) -> float:
    """(‖g_R‖²/‖g‖²) / (|R|/n): what a removed parameter contributed to −dL/dt = ‖g‖², relative to the average.

    Both shares are means over the prunings. Removing parameters at random gives 1. A weight that reads what an earlier
    pruning silenced has no gradient, but counts as a parameter.
    """
    share = removed_decrease(run)[["decrease", "parameters"]].sum("layer", skipna=False).mean("event", skipna=False)
    return float(share.decrease / share.parameters)


def decrease_within_layers(run: xr.DataTree) -> float:
    """‖g_R‖² / Σₗ (|Rₗ|/nₗ) ‖gₗ‖²: what the removed parameters contributed to ‖g‖², relative to their layers' average.

    Both as shares of ‖g‖², means over the prunings. Removing as many parameters of each layer at random gives 1: a
    measure chooses layers and filters, and this is what the choice of filters contributes.
    """
    events = at_prunings(run, ["removed_grad_sqnorm", "grad_sqnorm", "removed", "remaining"])
    before = events[["grad_sqnorm", "remaining"]].sel(stage="before", drop=True)
    average = events.removed * before.grad_sqnorm / before.remaining.where(before.remaining > 0, 1)
    whole = before.grad_sqnorm.sum("layer", skipna=False)
    shares = [part.sum("layer", skipna=False) / whole for part in (events.removed_grad_sqnorm, average)]
    found, expected = (float(share.mean(skipna=False)) for share in shares)
    return found / expected if expected else np.nan


def loss_change(run: xr.DataTree) -> float:
    """|ln(L_after / L_before)| at the probe, mean over the prunings: doubling and halving count as equal changes."""
    return _mean_log_change(at_prunings(run, ["loss"]).loss)


def norm_rate_change(run: xr.DataTree) -> float:
    """|Δ(d‖θ‖²/dt)| / 2Σ|θg|, mean over the prunings: how much d‖θ‖²/dt = −2θᵀg changes.

    In units of its value if all its terms had the same sign, since it may itself be near zero.
    """
    total = at_prunings(run, ["param_sqnorm_rate", "abs_param_grad"]).sum("layer", skipna=False)
    return _mean_change(total.param_sqnorm_rate, 2 * total.abs_param_grad.sel(stage="before"))


def norm_acceleration_change(run: xr.DataTree) -> float:
    """|Δ(‖g‖² + θᵀHg)| / ‖g‖², mean over the prunings: d²‖θ‖²/dt² = 2(‖g‖² + θᵀHg) is the flow's second order.

    In units of the first term, which is positive, while the second may have either sign.
    """
    total = at_prunings(run, ["grad_sqnorm", "param_hess_grad"]).sum("layer", skipna=False)
    return _mean_change(total.grad_sqnorm + total.param_hess_grad, total.grad_sqnorm.sel(stage="before"))


def grad_sqnorm_change(run: xr.DataTree) -> float:
    """|ln(‖g‖²_after / ‖g‖²_before)|, mean over the prunings; ‖g‖² after is that of the parameters that stay."""
    return _mean_log_change(at_prunings(run, ["grad_sqnorm"]).grad_sqnorm.sum("layer", skipna=False))


def grad_sqnorm_ratio(run: xr.DataTree) -> float:
    """‖g‖² after a pruning divided by that before, geometric mean over the prunings: below 1 it fell, above it rose."""
    total = at_prunings(run, ["grad_sqnorm"]).grad_sqnorm.sum("layer", skipna=False)
    return float(np.exp(_log_change(total).mean(skipna=False)))


def training_area(run: xr.DataTree) -> float:
    """Mean training loss of the steps after the last pruning, the area under the training curve."""
    return float(convergence(run).area)


def accuracy(run: xr.DataTree) -> float:
    """Final test accuracy: the fraction of correct answers on the test set."""
    return float(epoch_that_counts(run).get("test_accuracy", np.nan))


STATISTICS: dict[str, Callable[[xr.DataTree], float]] = {
    statistic.__name__: statistic
    for statistic in (
        decrease_per_parameter,
        decrease_within_layers,
        loss_change,
        norm_rate_change,
        norm_acceleration_change,
        grad_sqnorm_change,
        grad_sqnorm_ratio,
        training_area,
        accuracy,
    )
}


def log(ratio: _Values) -> _Values:
    """ln of a ratio, down to 2⁻²³: where nothing is left, it is as far from 1 as single precision tells."""
    found: Any = np.log(np.maximum(ratio, np.finfo(np.float32).eps))
    return found


def _log_change(staged: xr.DataArray) -> xr.DataArray:
    """ln(after/before) of each pruning; NaN where there was nothing before."""
    before = staged.sel(stage="before")
    return log(staged.sel(stage="after") / before.where(before > 0))


def _mean_log_change(staged: xr.DataArray) -> float:
    return float(abs(_log_change(staged)).mean(skipna=False))


def _mean_change(staged: xr.DataArray, scale: xr.DataArray) -> float:
    change = staged.sel(stage="after") - staged.sel(stage="before")
    return float((abs(change) / scale).mean(skipna=False))
