"""Flow time: whether steps have one, and whether all layers have it in common."""

from __future__ import annotations

import xarray as xr

from .record import MissingQuantityError


def check_flow(steps: xr.Dataset) -> None:
    """Raise MissingQuantityError where no step has a flow time: it is NaN in every layer that is trained, 0 in others.

    Where it is 0 in all layers nothing was trained, which is no lack.
    """
    unknown = steps.flow_step.isnull()
    if unknown.any() and (unknown | (steps.flow_step == 0)).all():
        raise MissingQuantityError(
            "gradient flow needs steps along the gradient, and no step here has a flow time (those of SGD have one, in "
            "layers with a single learning rate); loss_decrease and norm_balance hold for any optimizer"
        )


def common_flow_step(flow_step: xr.DataArray, grad_sqnorm: xr.DataArray) -> xr.DataArray:
    """The flow time Δt that all layers have in common which are trained or have a gradient, over ``step``; else NaN."""
    counted = flow_step.where((flow_step != 0) | (grad_sqnorm != 0))
    common = counted.max("layer")
    return common.where((counted.min("layer") == common) & ~flow_step.isnull().any("layer"))
