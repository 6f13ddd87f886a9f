"""What each pruning did to loss and gradient norm, predicted and measured; and what it left."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .record import node


def pruning_effect(run: xr.DataTree) -> xr.Dataset:
    """Change of the loss and of ‖g‖² by each event at its probe: measured, and predicted from before it.

    ===========  ==================  ==========================  =====================
    quantity     measured            first_order                 second_order
    ===========  ==================  ==========================  =====================
    loss         L_after − L_before  gᵀδ                         gᵀδ + ½ δᵀHδ
    grad_sqnorm  difference of ‖g‖²  2(gᵀHδ)_K − ‖g_R‖²          –
    ===========  ==================  ==========================  =====================

    δ = θ_after − θ_before, R the parameters pruned by the event, K those that stay. ‖g‖² after it is that of K alone:
    the gradient that training goes on with. So the removed parameters' own ‖g_R‖² goes, and only K's part of
    Σ gᵢ(Hδ)ᵢ counts; with nothing masked this is the plain 2gᵀHδ.

    Dims (quantity, event). Coordinates over ``event``: step, kind, and whatever the event was described with.

    Raises:
        MissingQuantityError: no event was recorded.
    """
    needs = ["loss", "grad_sqnorm", "grad_removal", "removal_hess_removal", "grad_hess_removal", "step"]
    events = node(run, "pruning", [*needs, "removed_grad_sqnorm", "removed_grad_hess_removal"])
    total = events.drop_vars([name for name in events if "layer" not in events[name].dims]).sum("layer", skipna=False)
    change = {
        "loss": events.loss.sel(stage="after") - events.loss.sel(stage="before"),
        "grad_sqnorm": total.grad_sqnorm.sel(stage="after") - total.grad_sqnorm.sel(stage="before"),
    }
    first = {
        "loss": total.grad_removal,
        "grad_sqnorm": 2 * (total.grad_hess_removal - total.removed_grad_hess_removal) - total.removed_grad_sqnorm,
    }
    second = {
        "loss": total.grad_removal + total.removal_hess_removal / 2,
        "grad_sqnorm": xr.full_like(total.grad_removal, np.nan),
    }
    parts = {"measured": change, "first_order": first, "second_order": second}
    quantity = xr.Variable("quantity", list(change))
    effects = xr.Dataset(
        {name: xr.concat([part.drop_vars("stage", errors="ignore") for part in values.values()], quantity)
         for name, values in parts.items()}
    )  # fmt: skip
    attributes = {name: events[name] for name in events if events[name].dims == ("event",)}
    removed = (total.removed / total.remaining.sel(stage="before")).drop_vars("stage")
    return effects.assign_coords({**attributes, "removed_share": removed})


def filters_left(run: xr.DataTree) -> xr.Dataset:
    """Share of each layer's filters that is left after each event.

    Variables over (event, layer): ``left`` and ``share``; over (layer): ``total``. Layers in the network's order.

    Raises:
        MissingQuantityError: no units were recorded.
    """
    units = node(run, "units", ["alive", "layer"])
    names = list(dict.fromkeys(units.layer.values.tolist()))
    layers = [units.alive.isel(unit=np.flatnonzero(units.layer.values == name)) for name in names]
    left = xr.concat([layer.sum("unit") for layer in layers], xr.Variable("layer", names)).transpose("event", "layer")
    total = xr.DataArray([layer.sizes["unit"] for layer in layers], coords={"layer": names})
    share = (left / total).assign_attrs(long_name="share of filters left", units="1")
    return xr.Dataset({"left": left, "total": total, "share": share})
