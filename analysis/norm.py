"""Predicted and measured velocity of the parameters' norm, and its exact balance over a step."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from .flow import check_flow, common_flow_step
from .given import check_count
from .prunings import event_steps
from .record import MissingQuantityError, columns, described, length, without_skipped
from .remembered import remembered


def norm_rate(run: xr.DataTree, *, window: int = 1) -> xr.Dataset:
    """Velocity of ‖θ‖² in flow time, per step and layer: measured, and predicted from θ and g before the step.

    ============  ====================================================
    measured      (‖θ+Δθ‖² − ‖θ‖²)/Δt = (2θᵀΔθ + ‖Δθ‖²)/Δt
    first_order   −2θᵀg − 2λ‖θ‖²                    the gradient flow of L + ½λ‖θ‖²
    second_order  −2θᵀg − 2λ‖θ‖² + Δt ‖g‖²          with what a step of length Δt adds to the flow
    ============  ====================================================

    Dims (step, layer); unit of the loss. All three are averaged over ``window`` steps, or at least half as many at the
    ends of the run and next to an event, across which no window extends. The prediction is for a step of gradient
    descent, up to terms in λΔt; with momentum, whose steps carry earlier gradients, it holds on average over windows
    longer than 1/(1−β) steps. Where a normalisation makes layers scale-invariant, θᵀg = 0: the flow preserves their
    norm, and all their growth comes from the last term. Skipped steps are left out.

    Raises:
        MissingQuantityError: /steps lacks a quantity, or no step has a flow time.
        ValueError: the window is not a positive whole number.
    """
    check_count(window, "window", "a number of steps", least=1)
    needs = ["param_update", "update_sqnorm", "param_grad", "decay_sqnorm", "grad_sqnorm", "flow_step"]
    steps = without_skipped(run, columns(run, "steps", needs))
    check_flow(steps)
    first = -2 * steps.param_grad - 2 * steps.decay_sqnorm
    rates = xr.Dataset(
        {
            "measured": _rate(2 * steps.param_update + steps.update_sqnorm, steps),
            "first_order": first,
            "second_order": first + steps.flow_step * steps.grad_sqnorm,
        }
    ).transpose("step", "layer")
    rates = rates if window == 1 else _averaged(run, rates, window)
    return described(
        rates,
        "param_sqnorm_rate",
        measured="d‖θ‖²/dt",
        first_order="−2θᵀg − 2λ‖θ‖²",
        second_order="−2θᵀg − 2λ‖θ‖² + Δt‖g‖²",
    )


@remembered
def network_norm_rate(run: xr.DataTree) -> xr.Dataset:
    """:func:`norm_rate` of the whole network over ``step``, averaged over 1/20 of the recorded steps, at least 10.

    It is NaN where trained layers have different flow times, because their velocities cannot be added up.

    Raises:
        MissingQuantityError: as :func:`norm_rate`, or the layers' flow times differ at every step.
    """
    window, rates = _window(run), norm_rate(run)
    network = rates.sum("layer", skipna=False, keep_attrs=True).where(_have_one_time(run, rates.step))
    if network.measured.isnull().all() and rates.measured.notnull().any():
        raise MissingQuantityError(
            "the velocity of the whole network's norm needs a flow time that all layers have in common, but theirs "
            "differ at every step; norm_rate holds for single layers, and norm_balance for all"
        )
    return _averaged(run, network, window).assign_attrs(window=window)


@remembered
def network_norm(run: xr.DataTree) -> xr.Dataset:
    """‖θ‖² of the whole network and its measured velocity, :func:`network_norm_rate`, over ``step``.

    The velocity is left out if the record lacks what it needs.

    Raises:
        MissingQuantityError: no ‖θ‖² was recorded.
    """
    sqnorm = columns(run, "steps", ["param_sqnorm"]).param_sqnorm.sum("layer", skipna=False, keep_attrs=True)
    try:
        rate = network_norm_rate(run).measured.rename("param_sqnorm_rate")
    except MissingQuantityError:
        return sqnorm.to_dataset()
    return xr.merge([sqnorm, rate], join="inner")


def layer_norm_rate(run: xr.DataTree) -> xr.DataArray:
    """The measured velocity of ‖θ‖² per step and layer, averaged over the windows of :func:`network_norm_rate`."""
    return norm_rate(run, window=_window(run)).measured.rename("param_sqnorm_rate")


def norm_balance(run: xr.DataTree) -> xr.Dataset:
    """The exact change of ‖θ‖² over each step, and what makes it up, per step and layer.

    ==============  =============================================================
    gradient        −2ηθᵀg
    weight_decay    −2ηλ‖θ‖²
    momentum        2θᵀΔθ minus the two above: what earlier gradients still contribute
    discretisation  ‖Δθ‖²
    total           2θᵀΔθ + ‖Δθ‖², the sum of the four
    measured        ‖θ‖² in the next step's row minus that in this one
    residual        measured − total: rounding, or something that changed θ between steps
    ==============  =============================================================

    Dims (step, layer); unit θ². Measured is NaN where the next row is not the next step, or an event lies in between.
    η and Δt are each layer's own, NaN where its parameters have several. Under Adam, "momentum" includes everything
    that preconditioning does. Skipped steps are left out.

    Raises:
        MissingQuantityError: /steps lacks a quantity.
    """
    needs = ["param_sqnorm", "param_update", "update_sqnorm", "param_grad", "decay_sqnorm", "learning_rate"]
    steps = columns(run, "steps", needs)
    gradient = -2 * steps.learning_rate * steps.param_grad
    decay = -2 * steps.learning_rate * steps.decay_sqnorm
    momentum = 2 * steps.param_update - gradient - decay
    total = 2 * steps.param_update + steps.update_sqnorm
    measured = (steps.param_sqnorm.shift(step=-1) - steps.param_sqnorm).where(_undisturbed(run, steps.step))
    balance = xr.Dataset(
        {
            "gradient": gradient,
            "weight_decay": decay,
            "momentum": momentum,
            "discretisation": steps.update_sqnorm,
            "total": total,
            "measured": measured,
            "residual": measured - total,
        }
    ).transpose("step", "layer")
    balance = without_skipped(run, balance)
    return described(balance, "param_sqnorm", **{str(name): str(name).replace("_", " ") for name in balance})


def _window(run: xr.DataTree) -> int:
    count = length(run, "steps")
    return min(max(10, count // 20), max(count, 1))


def _averaged(run: xr.DataTree, rates: xr.Dataset, window: int) -> xr.Dataset:
    """Means over windows of recorded steps; no window extends across an event or a gap in the record."""
    events = np.searchsorted(np.sort(event_steps(run)), rates.step, side="right")
    apart = np.diff(rates.step)
    gaps = np.cumsum(np.r_[0, apart > 2 * np.median(apart)] if apart.size else 0)
    parts = [rates.isel(step=np.flatnonzero(events + gaps == number)) for number in np.unique(events + gaps)]
    means = [part.map(partial(_rolled, window=window), keep_attrs=True) for part in parts]
    return xr.concat(means, "step") if means else rates


def _rolled(values: xr.DataArray, window: int) -> xr.DataArray:
    """Means over a window around each step; NaN if fewer than half of its values are known, or one is infinite."""
    rows = values.transpose("step", ...)
    table = rows.values.reshape(rows.sizes["step"], -1).astype(float)
    finite = np.isfinite(table)
    total, known, infinite = (
        _sums(part.astype(float), window) for part in (np.where(finite, table, 0), finite, np.isinf(table))
    )
    enough = (known >= (window + 1) // 2) & (infinite == 0)
    return rows.copy(data=np.where(enough, total / np.maximum(known, 1), np.nan).reshape(rows.shape))


def _sums(rows: np.ndarray, window: int) -> np.ndarray:
    """Sums of the rows in a window around each row, at a cost that does not depend on the window's length.

    The rows are divided into blocks of the window's length, so that each window is the end of one block and the
    beginning of the next. Unlike in a sliding sum nothing is subtracted, so no rounding error accumulates.
    """
    count = len(rows)
    padded = np.pad(rows, ((window // 2, 2 * window - (window // 2 + count) % window), (0, 0)))
    blocks = padded.reshape(-1, window, rows.shape[1])
    ends = blocks[:, ::-1].cumsum(1)[:, ::-1].reshape(padded.shape)[:count]
    beginnings = blocks.cumsum(1).reshape(padded.shape)[window - 1 :][:count]
    aligned = (np.arange(count) % window == 0)[:, None]
    return np.where(aligned, ends, ends + beginnings)


def _have_one_time(run: xr.DataTree, step: xr.DataArray) -> xr.DataArray:
    """True where all trained layers have the same flow time, or no layer is trained, over ``step``."""
    steps = columns(run, "steps", ["flow_step", "grad_sqnorm"]).sel(step=step)
    still = ((steps.flow_step == 0) & (steps.grad_sqnorm == 0)).all("layer")
    return common_flow_step(steps.flow_step, steps.grad_sqnorm).notnull() | still


def _rate(change: xr.DataArray, steps: xr.Dataset) -> xr.DataArray:
    """Change divided by flow time; 0 where a layer is not trained, so that both are zero.

    If the layer has no flow time (NaN) at steps that do train it, its rate is unknown at the others, too.
    """
    still = (steps.flow_step == 0) & (steps.grad_sqnorm == 0) & (change == 0) & steps.flow_step.notnull().all("step")
    return (change / steps.flow_step.where(steps.flow_step != 0)).where(~still, 0.0)


def _undisturbed(run: xr.DataTree, step: xr.DataArray) -> xr.DataArray:
    """True where the next row is the next step and no event lies in between."""
    following = step.shift(step=-1, fill_value=-1)
    return (following == step + 1) & ~xr.DataArray(np.isin(following, event_steps(run)), coords={"step": step})
