"""The effect of each pruning on loss, gradient and flow, predicted and measured, and what it left."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .prunings import at_prunings, of_prunings, prunings
from .record import MissingQuantityError, columns, node
from .remembered import remembered

_STAGED = ("loss", "grad_sqnorm", "param_sqnorm_rate", "param_hess_grad")
_REMOVAL = (
    "grad_removal",
    "removal_hess_removal",
    "kept_grad_hess_removal",
    "grad_sqnorm_second_order",
    "param_grad_first_order",
    "param_grad_second_order",
)
_NEEDS = (*_STAGED, *_REMOVAL, "removed_grad_sqnorm", "removed", "remaining")
_OF_EVENTS = "param_hess_grad_first_order"


def pruning_effect(run: xr.DataTree) -> xr.Dataset:
    """What each event changed in the whole network, at its probe: measured, and predicted from the state before it.

    Events that changed no parameter and are not prunings (a mere look, a new learning rate) have no row.

    =================  ===================  ===================================  ==================================
    quantity           measured             first_order                          second_order: with this added
    =================  ===================  ===================================  ==================================
    loss               L_after − L_before   gᵀδ                                  ½ δᵀHδ
    grad_sqnorm        difference of ‖g‖²   2 g_Kᵀ(Hδ)_K − ‖g_R‖²                ‖(Hδ)_K‖² + g_KᵀT[δ,δ]_K
    param_sqnorm_rate  of −2θᵀg             −2 (θ_Kᵀ(g + Hδ)_K − θᵀg)            −θ_KᵀT[δ,δ]_K
    param_hess_grad    of θᵀHg              θ_Kᵀ(Hg + H((Hδ)_K − g_R) + T[δ]g_K)_K − θᵀHg
    =================  ===================  ===================================  ==================================

    δ = θ_after − θ_before, R are the parameters that the event pruned, K those that stay, T the derivative of H.
    Gradients after the event are those of K alone, with which training continues: the removed parameters' own share is
    gone for good, and only K's part of Hδ counts. (Where what stays moves too, the last two rows also contain δ_Kᵀ
    times the same vector.) Errors are O(‖δ‖²) in first and O(‖δ‖³) in second order. θᵀHg in second order would need
    fourth derivatives, and is NaN.

    Where a filter is removed with its normalisation, δ shrinks its weights and its γ together, so its output shrinks
    twice as fast at first: the first order counts the filter twice, however few are removed (:func:`removal_curve` has
    both directions).

    Dims (quantity, event). Coordinates over ``event``: step, kind, the event's own attributes, and ``removed_share``,
    |R| divided by the number of parameters left before.

    Raises:
        MissingQuantityError: no event was recorded, or none changed a parameter.
    """
    return _of_events(run, per_layer=False)


@remembered
def effect_of_prunings(run: xr.DataTree) -> xr.Dataset:
    """:func:`pruning_effect` of the prunings alone; if nothing was pruned, of the events that changed a parameter.

    Raises:
        MissingQuantityError: no event was recorded, or none changed a parameter.
    """
    if not len(prunings(run)):
        return pruning_effect(run)
    return _of_rows(of_prunings(run, _rows(run)), per_layer=False)


def pruning_effect_per_layer(run: xr.DataTree) -> xr.Dataset:
    """:func:`pruning_effect` layer by layer: dims (quantity, event, layer), which add up over ``layer``.

    For ‖g‖², d‖θ‖²/dt and θᵀHg, what is measured and predicted in layer l is the change of the layer's own sum. The
    loss has no layers: its prediction is what the removal in layer l contributes, gₗᵀδₗ + ½ δₗᵀ(Hδ)ₗ, and nothing is
    measured.

    Raises:
        MissingQuantityError: no event was recorded, or none changed a parameter.
    """
    return _of_events(run, per_layer=True)


@remembered
def first_pruning_per_layer(run: xr.DataTree) -> xr.Dataset:
    """:func:`pruning_effect_per_layer` of the first pruning alone: dims (quantity, layer).

    Raises:
        MissingQuantityError: nothing was pruned.
    """
    return _of_rows(of_prunings(run, _rows(run)).isel(event=[0]), per_layer=True).isel(event=0)


def removal_curve(run: xr.DataTree) -> xr.Dataset:
    """:func:`pruning_effect` of prunings that were tried on copies, over the share of the filters removed.

    Along "parameters", δ removes all parameters that go with a filter; along "output", only its last γ and β, which
    leads to the same network. θᵀHg is only measured. Dims (quantity, event, direction, fraction), and
    ``removed_share`` over (event, fraction).

    Raises:
        MissingQuantityError: no curve was added to an event.
    """
    return _changes(node(run, "curve", [*_NEEDS, "fraction"]), per_layer=False)


@remembered
def removed_decrease(run: xr.DataTree) -> xr.Dataset:
    """What share of the first-order decrease of the loss the removed parameters carried, at each pruning's probe.

    Along gradient flow, dL/dt = −‖g‖², to which parameter i contributes −gᵢ². Variables over (event, layer), pure
    numbers; the first two add up over ``layer`` to those of the network:

    ===============  ==========================================================================
    decrease         ‖g_R‖²/‖g‖²: the removed parameters of the layer, as a share of the whole decrease
    parameters       |R|/n: their number, as a share of all parameters that were left
    of_layer         ‖g_R‖²/‖g_l‖²: as a share of the layer's own part; NaN where it has none
    ===============  ==========================================================================

    Coordinates over ``event`` as in :func:`pruning_effect`.

    Raises:
        MissingQuantityError: no pruning was recorded.
    """
    needs = ["removed_grad_sqnorm", "grad_sqnorm", "removed", "remaining", "step"]
    events = of_prunings(run, node(run, "pruning", needs))
    before = events[["grad_sqnorm", "remaining"]].sel(stage="before", drop=True)
    whole = before.sum("layer", skipna=False)
    shares = xr.Dataset(
        {
            "decrease": events.removed_grad_sqnorm / whole.grad_sqnorm,
            "parameters": events.removed / whole.remaining,
            "of_layer": events.removed_grad_sqnorm / before.grad_sqnorm.where(before.grad_sqnorm > 0),
        }
    )
    return shares.assign_coords(_attributes(events))


@remembered
def loss_and_gradient_at_pruning(run: xr.DataTree) -> xr.Dataset:
    """Loss and ‖g‖² right after each pruning over those right before it, at its probe.

    Variables ``loss`` and ``grad_sqnorm`` over ``event``, pure numbers; coordinate ``removed_share``, the parameters
    that went as a share of those that were left. ‖g‖² after is that of the parameters that stay.

    Raises:
        MissingQuantityError: no pruning was recorded.
    """
    events = at_prunings(run, ["loss", "grad_sqnorm", "removed", "remaining"])
    layered = events[["grad_sqnorm", "removed", "remaining"]].sum("layer", skipna=False)
    staged = layered[["grad_sqnorm"]].assign(loss=events.loss)
    before = staged.sel(stage="before", drop=True)
    ratio = staged.sel(stage="after", drop=True) / before.where(before > 0)
    share = layered.removed / layered.remaining.sel(stage="before", drop=True)
    return ratio.assign_coords(removed_share=share)


def _attributes(events: xr.Dataset) -> dict[str, xr.DataArray]:
    return {str(name): events[name] for name in events if events[name].dims == ("event",)}


def _rows(run: xr.DataTree) -> xr.Dataset:
    return node(run, "pruning", [*_NEEDS, "step"])


def _of_events(run: xr.DataTree, *, per_layer: bool) -> xr.Dataset:
    events = _rows(run)
    moved = (events[["grad_removal", "removal_hess_removal"]] != 0).to_array().any(("variable", "layer"))
    chosen = np.union1d(prunings(run), np.flatnonzero(moved))
    if not len(chosen):
        raise MissingQuantityError("no event in /pruning moved a parameter: prune inside `with recorder.event(...)`")
    return _of_rows(events.isel(event=chosen), per_layer=per_layer)


def _of_rows(events: xr.Dataset, *, per_layer: bool) -> xr.Dataset:
    attributes = _attributes(events)
    return _changes(events.drop_vars(attributes), per_layer=per_layer).assign_coords(attributes)


def _changes(rows: xr.Dataset, *, per_layer: bool) -> xr.Dataset:
    """Measured and predicted change of each quantity, from rows of ``/pruning``, per layer or summed over them."""
    summed = [name for name in (*_NEEDS, _OF_EVENTS) if name != "loss" and name in rows]
    sums = rows[summed] if per_layer else rows[summed].sum("layer", skipna=False)
    sums["loss"] = rows.loss.where(False).broadcast_like(sums.removed) if per_layer else rows.loss
    measured = {name: (sums[name].sel(stage="after") - sums[name].sel(stage="before")) for name in _STAGED}
    first = {
        "loss": sums.grad_removal,
        "grad_sqnorm": 2 * sums.kept_grad_hess_removal - sums.removed_grad_sqnorm,
        "param_sqnorm_rate": -2 * sums.param_grad_first_order,
    }
    second = {
        "loss": first["loss"] + sums.removal_hess_removal / 2,
        "grad_sqnorm": first["grad_sqnorm"] + sums.grad_sqnorm_second_order,
        "param_sqnorm_rate": first["param_sqnorm_rate"] - 2 * sums.param_grad_second_order,
    }
    if _OF_EVENTS in sums:
        first["param_hess_grad"] = sums[_OF_EVENTS]
    parts = {"measured": measured, "first_order": first, "second_order": second}
    missing = first["loss"].where(False)
    changes = {
        part: xr.Dataset({name: values.get(name, missing) for name in _STAGED}).to_array("quantity")
        for part, values in parts.items()
    }
    share = sums.removed / sums.remaining.sel(stage="before")
    return xr.Dataset(changes).drop_vars("stage", errors="ignore").assign_coords(removed_share=share.drop_vars("stage"))


def filters_left(run: xr.DataTree) -> xr.Dataset:
    """Share of each layer's filters that is left after each event.

    Variables over (event, layer): ``left`` and ``share``; over (layer): ``total``. Layers in the network's order.

    Raises:
        MissingQuantityError: no units were recorded.
    """
    units = columns(run, "units", ["alive", "layer"])
    names = list(dict.fromkeys(units.layer.values.tolist()))
    of_layer = xr.DataArray(units.layer.values == np.array(names)[:, None], {"layer": names}, ("layer", "unit"))
    left, total = (units.alive & of_layer).sum("unit"), of_layer.sum("unit")
    share = (left / total).assign_attrs(long_name="share of filters left", units="1")
    return xr.Dataset({"left": left, "total": total, "share": share})
