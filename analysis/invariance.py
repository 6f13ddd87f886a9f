"""Which filters are scale-invariant, in which mode, and what this means for GraSP's score."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .measures import rank_correlations
from .record import columns

_NEEDS = ("param_sqnorm", "grad_sqnorm", "param_grad", "param_hess_grad", "layer")


def scale_invariance(run: xr.DataTree, *, tolerance: float = 0.01) -> xr.Dataset:
    """How nearly each filter f satisfies θ_fᵀg_f = 0 and θ_fᵀ(Hg)_f = −‖g_f‖², in training and in eval mode.

    ==============  =========================================================================
    alignment       |θ_fᵀg_f| / (‖θ_f‖ ‖g_f‖): the cosine between filter and gradient
    deviation       |θ_fᵀ(Hg)_f + ‖g_f‖²| / ‖g_f‖²
    invariant       1 where both are below ``tolerance``, else 0
    ==============  =========================================================================

    Dims (event, mode, unit), pure numbers; NaN where a filter is pruned or has no gradient. The identities hold up to a
    normalisation's ε and to rounding, so neither number is zero.

    Raises:
        MissingQuantityError: no such study was added to an event.
    """
    filters = columns(run, "invariance", _NEEDS)
    grad_sqnorm = filters.grad_sqnorm.where(filters.grad_sqnorm > 0)
    alignment = np.abs(filters.param_grad) / np.sqrt(filters.param_sqnorm * grad_sqnorm)
    deviation = np.abs(filters.param_hess_grad + grad_sqnorm) / grad_sqnorm
    invariant = ((alignment < tolerance) & (deviation < tolerance)).where(deviation.notnull())
    return xr.Dataset({"alignment": alignment, "deviation": deviation, "invariant": invariant})


def grasp_and_gradient(run: xr.DataTree) -> xr.Dataset:
    """How far GraSP's score Σθ(Hg) of a filter is merely −‖g_f‖²: Spearman's ρ of the two over all filters.

    Dims (event, mode). 1 means that both rank the filters alike, so removing the lowest scores removes the filters with
    the largest gradients; this is so where all filters are scale-invariant. NaN where either does not differ between
    filters, as in a dead network.

    Raises:
        MissingQuantityError: no such study was added to an event.
    """
    filters = columns(run, "invariance", _NEEDS)
    rank = xr.apply_ufunc(
        _spearman, filters.param_hess_grad, -filters.grad_sqnorm, input_core_dims=[["unit"], ["unit"]], vectorize=True
    )
    return xr.Dataset({"rank_correlation": rank})


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    both = np.stack([left, right])
    return rank_correlations(both[:, np.isfinite(both).all(0)])[0, 1]
