"""Flow time: whether steps have one, and whether it is the same in all layers."""

from __future__ import annotations

import xarray as xr

from .record import MissingQuantityError


def check_flow(steps: xr.Dataset) -> None:
    """Raise MissingQuantityError if no step has a flow time: it is NaN in every trained layer, and 0 in the others.

    If it is 0 in all layers, nothing was trained, which is not an error.
    """
    unknown = steps.flow_step.isnull()
    if unknown.any() and (unknown | (steps.flow_step == 0)).all():
        raise MissingQuantityError(
            "gradient flow needs steps along the gradient, and no step here has a flow time (those of SGD have one, in "
            "layers with a single learning rate); loss_decrease and norm_balance hold for any optimizer"
        )


def common_flow_step(flow_step: xr.DataArray, grad_sqnorm: xr.DataArray) -> xr.DataArray:
    """The flow time Δt that all layers with training or a gradient share, over ``step``; NaN where they differ."""
    counted = flow_step.where((flow_step != 0) | (grad_sqnorm != 0))
    common = counted.max("layer")
    return common.where((counted.min("layer") == common) & ~flow_step.isnull().any("layer"))
