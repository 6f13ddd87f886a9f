"""Which filters a normalisation makes scale-invariant: θ_fᵀg_f and θ_fᵀ(Hg)_f of each, in training and eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import xarray as xr
from torch import nn

from ..float64 import widened
from ..network.masks import filters_left
from ..network.wrappers import unwrap
from ..probing.objective import Objective, cross_entropy_objective
from ..probing.probe import Probe
from ..quantities import FORMULAS, Vectors
from ..schema import quantities
from .candidates.units import filter_coordinates, unit_layers
from .candidates.weights import weight_of

MODES = ("train", "eval")


def scale_invariance(
    model: nn.Module,
    probe: Sequence[Any],
    *,
    objective: Objective = cross_entropy_objective,
    protected: Iterable[str] = (),
) -> xr.Dataset:
    """‖θ_f‖², ‖g_f‖², θ_fᵀg_f and θ_fᵀ(Hg)_f of each filter f of the ranked convolutions, in both modes.

    Where a filter's output is normalised by its own batch, L(θ) does not depend on the filter's length, and

        θ_fᵀg_f = 0,    θ_fᵀ(Hg)_f = −‖g_f‖²    (differentiate L(aθ_f) = L(θ_f) by a, then by θ).

    Both hold up to the normalisation's ε, in training mode. In eval mode, with running statistics, neither does. A
    bias, a depthwise layer or dropout between filter and normalisation changes nothing but what is normalised.

    Args:
        model: see :func:`scores`; it is left as it is.
        probe: batches at which the loss is evaluated; in training mode each is normalised by itself.
        objective: the loss.
        protected: names of layers that are left out.

    Returns:
        Dims (mode, unit), with the coordinates layer and index of each filter; NaN where a filter is pruned. To be
        added to an event: ``event.add("invariance", ...)``.
    """
    model = unwrap(model)
    layers = unit_layers(model, protected)
    names = [layer.name for layer in layers]
    sums = xr.concat(
        [_of_filters(model, names, probe, objective, mode) for mode in MODES], xr.Variable("mode", list(MODES))
    )
    return sums.assign_coords(filter_coordinates(layers))


@torch.no_grad()
def _of_filters(
    model: nn.Module, layers: list[str], probe: Sequence[Any], objective: Objective, mode: str
) -> xr.Dataset:
    expansion = Probe(model, objective, probe, mode=mode).expand()
    grad = dict(zip(expansion.theta, expansion.grad, strict=True))
    hess_grad = dict(zip(expansion.theta, expansion.hessian_product(expansion.grad), strict=True))
    names, found = [row.name for row in quantities("invariance")], []
    for layer in layers:
        key = weight_of(layer)
        rows = [widened(vectors[key].detach()).flatten(1) for vectors in (expansion.theta, grad, hess_grad)]
        of_layer = Vectors(theta=rows[0], grad=rows[1], hess_grad=rows[2])
        alive = filters_left(model, layer)
        found.append([FORMULAS[name](of_layer).where(alive, torch.nan) for name in names])
    return xr.Dataset(
        {
            name: ("unit", torch.cat(parts).cpu().double().numpy())
            for name, parts in zip(names, zip(*found, strict=True), strict=True)
        }
    )
