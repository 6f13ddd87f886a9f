"""Predicted and measured decrease of the loss in each step."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .flow import check_flow, common_flow_step
from .record import MissingQuantityError, columns, described, node, without_skipped
from .remembered import remembered


@remembered
def loss_decrease(run: xr.DataTree) -> xr.Dataset:
    """Loss decrease over each measured step, on the step's own batch: measured, and predicted from θ before the step.

    ==================  =====================================================
    measured            L(θ) − L(θ+Δθ)
    first_order         −gᵀΔθ                       error O(‖Δθ‖²)
    second_order        −gᵀΔθ − ½ ΔθᵀHΔθ            error O(‖Δθ‖³)
    first_order_flow    Δt ‖g‖²                     gradient flow over the step's flow time Δt
    second_order_flow   Δt ‖g‖² − Δt² gᵀHg          (the coefficient is 1: the flow is not the step)
    ==================  =====================================================

    Dims ``step``; unit of the loss. g and H are those of the loss on that batch, without weight decay. The flow rows
    assume a step of gradient descent; with momentum, a step also carries earlier batches, so they hold on average. They
    are NaN where layers have different learning rates, because the parameters then have no common time, and where the
    optimizer is not SGD. Skipped steps are left out.

    Raises:
        MissingQuantityError: no curvature was recorded.
    """
    needs = ["loss_before", "loss_after", "grad_update", "update_hess_update", "grad_sqnorm", "grad_hess_grad"]
    curvature = without_skipped(run, node(run, "curvature", needs))
    total = curvature.sum("layer", skipna=False)
    flow_step = _flow_step(run, curvature)
    first, first_flow = -total.grad_update, flow_step * total.grad_sqnorm
    return described(
        xr.Dataset(
            {
                "measured": curvature.loss_before - curvature.loss_after,
                "first_order": first,
                "second_order": first - total.update_hess_update / 2,
                "first_order_flow": first_flow,
                "second_order_flow": first_flow - flow_step**2 * total.grad_hess_grad,
            }
        ),
        "loss",
        measured="L(θ) − L(θ+Δθ)",
        first_order="−gᵀΔθ",
        second_order="−gᵀΔθ − ½ΔθᵀHΔθ",
        first_order_flow="Δt‖g‖²",
        second_order_flow="Δt‖g‖² − Δt²gᵀHg",
    )


@remembered
def stability(run: xr.DataTree) -> xr.Dataset:
    """Δt gᵀHg/‖g‖² at each measured step: plain gradient descent lowers the quadratic model iff this is below 2.

    Dims ``step``, without skipped ones; a pure number. Δt is the step's flow time, which is the learning rate if there
    is no momentum; NaN where layers have different ones.

    Raises:
        MissingQuantityError: no curvature was recorded, or no measured step has a flow time that all layers have in
            common and a gradient that is finite and not zero.
    """
    check_flow(columns(run, "steps", ["flow_step"]))
    curvature = without_skipped(run, node(run, "curvature", ["grad_hess_grad", "grad_sqnorm"]))
    total = curvature[["grad_hess_grad", "grad_sqnorm"]].sum("layer", skipna=False)
    flow_step = _flow_step(run, curvature)
    if flow_step.size and flow_step.isnull().all():
        raise MissingQuantityError("stability needs one learning rate: the layers' differ at every measured step")
    ratio = flow_step * total.grad_hess_grad / total.grad_sqnorm
    if ratio.size and not np.isfinite(ratio).any():
        raise MissingQuantityError("stability needs a measured step whose gradient is finite and not zero")
    return xr.Dataset({"stability": ratio.assign_attrs(long_name="Δt gᵀHg/‖g‖²", units="1")})


def _flow_step(run: xr.DataTree, curvature: xr.Dataset) -> xr.DataArray:
    """The flow time Δt that all layers with a gradient share, over ``step``; NaN where they differ.

    It refers to the flow of the measured loss: where the applied gradient ĝ is a multiple of that loss's gradient g,
    because the loop sums over the batch or clips, say, the step is longer by the factor gᵀĝ/‖g‖².
    """
    flow_step = columns(run, "steps", ["flow_step"]).flow_step.reindex(step=curvature.step)
    common = common_flow_step(flow_step, curvature.grad_sqnorm)
    if "grad_applied_grad" not in curvature:
        return common
    product, square = (curvature[name].sum("layer", skipna=False) for name in ("grad_applied_grad", "grad_sqnorm"))
    return common * (product / square.where(square > 0)).where(square > 0, 1.0)
