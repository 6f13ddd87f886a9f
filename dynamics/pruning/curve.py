"""What pruning would do to a network, as a function of the share of filters: measured on copies at a fixed probe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from ..loop.processes import Processes
from ..network.layers import Layers
from ..network.masks import apply_masks, filters_left
from ..network.wrappers import unwrap
from ..probing.objective import Objective, cross_entropy_objective
from ..probing.probe import Probe
from ..recording.event import Stage, measured, predicted
from ..schema import STAGES, quantities
from .candidates.channels import NORMALISATIONS
from .candidates.units import UnitLayer, masks_of, units_of
from .selection import Ranked, capacity, lowest, without

DIRECTIONS = ("parameters", "output")


def removal_curve(
    model: nn.Module,
    probe: Sequence[Any],
    scores: Mapping[str, Tensor],
    fractions: Sequence[float],
    *,
    objective: Objective = cross_entropy_objective,
    mode: str = "eval",
    protected: Iterable[str] = (),
) -> xr.Dataset:
    """The quantities of ``/pruning`` for several shares of filters: for each, those of lowest score are pruned.

    Both directions δ lead to the same pruned network, so they share what is measured:

    ============  ==================================================================================
    "parameters"  −θ on all parameters pruned with a filter: its weights, its bias, γ and β
    "output"      −θ on the last normalisation's γ and β alone, where the filter has one; else as above
    ============  ==================================================================================

    A filter's output is γ·(w·x) + β: linear along γ and β, so that a first-order prediction becomes exact as fewer
    filters are pruned. Along all parameters, w and γ shrink together and the output at first shrinks twice as fast: the
    first order then counts it twice, however few are pruned.

    Args:
        model: see :func:`scores`; it is left as it is.
        probe: batches at which everything is evaluated.
        scores: score of each filter by the name of its layer, as :func:`scores` gives them.
        objective: the loss.
        mode: "eval" or "train", the mode of BatchNorm and dropout.
        protected: names of layers that are left out: neither counted nor pruned.
        fractions: shares of the remaining filters to prune, each in (0, 1), ascending. Each layer keeps its best.

    Returns:
        Dims (direction, fraction, stage, layer), to be added to an event: ``event.add("curve", ...)``.

    Raises:
        ValueError: a fraction outside (0, 1), none at all, or more filters than can be pruned; or scores of other
            layers or filters.
    """
    fractions = [float(fraction) for fraction in fractions]
    if not fractions or sorted(set(fractions)) != fractions or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"fractions must increase within (0, 1), got {fractions}")
    model = unwrap(model)
    units = units_of(model, "filter", protected)
    _check_scores(scores, units)
    ranked = {name: _ranked(model, layer, scores[name]) for name, layer in units.items()}
    left = sum(int(layer.standing.sum()) for layer in ranked.values())
    counts = [left - round(left * (1 - fraction)) for fraction in fractions]  # as a Pruner counts
    if counts[-1] > capacity(ranked):
        raise ValueError(
            f"fraction {fractions[-1]} asks for {counts[-1]} filters to be pruned, but only {capacity(ranked)} can be"
        )
    whole = {name: torch.ones(layer.filters, dtype=torch.bool, device="cpu") for name, layer in units.items()}
    layers, before = Layers(model), _stage(model, objective, probe, mode)
    outputs, points = _outputs(model, layers, units), []
    for count in counts:
        pruned = copy.deepcopy(model)
        apply_masks(pruned, masks_of(pruned, units, without(whole, lowest(ranked, count))))
        points.append(_compared(layers, before, _stage(pruned, objective, probe, mode), outputs))
    return xr.concat(points, xr.Variable("fraction", fractions)).assign_coords(layer=layers.names)


def _check_scores(scores: Mapping[str, Tensor], units: Mapping[str, UnitLayer]) -> None:
    wanted = "removal_curve() takes scores as dynamics.pruning.scores(model, batches, measure) gives them"
    if not isinstance(scores, Mapping):
        raise ValueError(f"{wanted}, a tensor by the name of each layer, got {scores!r:.60}")
    for name, layer in units.items():
        if name not in scores:
            raise ValueError(f"{wanted}, but there are none of layer {name!r}, only of {', '.join(map(repr, scores))}")
        if scores[name].shape != (layer.filters,):
            raise ValueError(
                f"{wanted}, but those of layer {name!r}, which has {layer.filters} filters, have the shape "
                f"{tuple(scores[name].shape)}"
            )


def _compared(layers: Layers, before: Stage, after: Stage, outputs: Tensor) -> xr.Dataset:
    """Measured quantities of one pruned copy and the network before, and predictions along both directions."""
    removal = after.theta - before.theta
    rows = {row.name: row.dims("curve") for row in quantities("curve")}
    along = [predicted(layers, before, after, direction, "curve") for direction in (removal, removal * outputs)]
    values = measured(layers, before, after)
    for name in along[0]:
        both = "direction" in rows[name]
        values[name] = torch.stack([one[name] for one in along]) if both else along[0][name]
    dims = {name: [dim for dim in rows[name] if dim not in ("event", "fraction")] for name in values}
    return xr.Dataset(
        {name: (dims[name], value.cpu().numpy()) for name, value in values.items()},
        coords={"direction": list(DIRECTIONS), "stage": list(STAGES)},
    )


def _stage(model: nn.Module, objective: Objective, batches: Sequence[Any], mode: str) -> Stage:
    return Stage(Layers(model), Processes(model), Probe(model, objective, batches, mode=mode).expand())


def _ranked(model: nn.Module, layer: UnitLayer, scores: Tensor) -> Ranked:
    """A layer's filters in the ranking: those that are not pruned; the best of them always stays."""
    return Ranked(scores.cpu().double(), filters_left(model, layer.name).cpu(), keep=1, movable=not layer.head)


def _outputs(model: nn.Module, layers: Layers, units: Mapping[str, UnitLayer]) -> Tensor:
    """1 on the parameters along which "output" removes a filter, else 0, as blocks of a vector."""
    names = [name for layer in units.values() for name in _output_names(model, layer)]
    return layers.vector({name: torch.ones_like(model.get_parameter(name)) for name in names})


def _output_names(model: nn.Module, layer: UnitLayer) -> Iterator[str]:
    normalisations = [name for name in layer.modules if isinstance(model.get_submodule(name), NORMALISATIONS)]
    for module in normalisations[-1:] or [layer.name]:
        yield from (f"{module}.{leaf}" for leaf, _ in model.get_submodule(module).named_parameters(recurse=False))
