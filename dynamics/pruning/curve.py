"""What pruning would do to a network, over the share of its filters that goes: pruned copies at one fixed probe."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from ..event import Stage, measured, predicted
from ..layers import Layers
from ..masks import apply_masks, parameter_masks
from ..probe import Objective, Probe, cross_entropy_objective, unwrap
from ..processes import Processes
from ..schema import STAGES, quantities
from .units import UnitLayer, unit_layers

DIRECTIONS = ("filter", "gate")


def removal_curve(
    model: nn.Module,
    probe: Sequence[Any],
    scores: Mapping[str, Tensor],
    fractions: Sequence[float],
    *,
    objective: Objective = cross_entropy_objective,
    mode: str = "eval",
) -> xr.Dataset:
    """The quantities of ``/pruning`` for prunings of several extents: for each, the filters of lowest score go.

    Both directions δ lead to the same pruned network, so they share what is measured:

    ==========  ====================================================================================
    "filter"    −θ on all parameters that go with a filter: its weights, its bias, γ and β
    "gate"      −θ on the last normalisation's γ and β alone, where the filter has one; else as above
    ==========  ====================================================================================

    A filter's output is γ·(w·x) + β: linear along the gate, so that a first-order prediction becomes exact as fewer
    filters go. Along all parameters w and γ shrink together, the output twice as fast at first: the first order then
    counts it twice, however few go.

    Args:
        model: see :func:`scores`; it is left as it is.
        probe: batches at which everything is evaluated.
        scores: score of each filter by the name of its layer, as :func:`scores` gives them.
        fractions: shares of the filters alive that go, each in (0, 1), ascending. The best filter of a layer stays.

    Returns:
        Dims (direction, fraction, stage, layer), to be added to an event: ``event.add("curve", ...)``.

    Raises:
        ValueError: a fraction outside (0, 1), none at all, or more filters than can go.
    """
    if not fractions or sorted(set(fractions)) != list(fractions) or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"fractions must ascend within (0, 1), got {list(fractions)}")
    model = unwrap(model)
    ranked = _ranked(model, scores)
    alive = sum(int(_alive(model, layer).sum()) for layer in unit_layers(model))
    counts = [round(fraction * alive) for fraction in fractions]
    if counts[-1] > len(ranked):
        raise ValueError(f"fraction {fractions[-1]} asks for {counts[-1]} filters to go, but only {len(ranked)} can")
    layers, before = Layers(model), _stage(model, model, objective, probe, mode)
    gate = _gate(model, layers)
    points = [_point(model, layers, before, gate, ranked[:count], objective, probe, mode) for count in counts]
    return xr.concat(points, xr.Variable("fraction", list(fractions))).assign_coords(layer=layers.names)


def _point(
    model: nn.Module, layers: Layers, before: Stage, gate: Tensor, gone: list[tuple[UnitLayer, int]], *probing: Any
) -> xr.Dataset:
    """One pruned copy, compared with the network before."""
    pruned = copy.deepcopy(model)
    apply_masks(pruned, _masks(pruned, gone))
    after = _stage(model, pruned, *probing)
    removal = after.theta - before.theta
    rows = {row.name: row.dims("curve") for row in quantities("curve")}
    along = [predicted(layers, before, after, removal * part) for part in (torch.ones_like(gate), gate)]
    values = measured(layers, before, after)
    values |= {
        name: torch.stack([one[name] for one in along]) if "direction" in rows[name] else along[0][name]
        for name in along[0]
    }
    dims = {name: [dim for dim in rows[name] if dim not in ("event", "fraction")] for name in values}
    return xr.Dataset(
        {name: (dims[name], value.cpu().numpy()) for name, value in values.items()},
        coords={"direction": list(DIRECTIONS), "stage": list(STAGES)},
    )


def _stage(known: nn.Module, model: nn.Module, objective: Objective, batches: Sequence[Any], mode: str) -> Stage:
    expansion = Probe(model, objective, batches, mode=mode).expand()
    return Stage(Layers(model), Processes(known), expansion)


def _ranked(model: nn.Module, scores: Mapping[str, Tensor]) -> list[tuple[UnitLayer, int]]:
    """The filters that may go, lowest score first: those alive, less the best of each layer and what is protected."""
    entries = []
    for layer in unit_layers(model):
        if layer.name not in getattr(model, "protected", ()):
            alive = _alive(model, layer).nonzero().flatten()
            values = scores[layer.name].to(alive.device)[alive]
            order = alive[values.argsort(stable=True)][:-1].tolist()
            entries += [(scores[layer.name][index].item(), layer, index) for index in order]
    return [(layer, index) for _, layer, index in sorted(entries, key=lambda entry: entry[0])]


def _alive(model: nn.Module, layer: UnitLayer) -> Tensor:
    """Which filters of a layer are not pruned, (filter,)."""
    mask = parameter_masks(model).get(f"{layer.name}.weight")
    return torch.ones(layer.filters, dtype=torch.bool) if mask is None else mask.flatten(1).any(1)


def _masks(model: nn.Module, gone: list[tuple[UnitLayer, int]]) -> dict[str, Tensor]:
    """What is kept of each parameter that the filters' removal touches."""
    masks: dict[str, Tensor] = {}
    for layer, index in gone:
        for name in layer.parameter_names(model):
            masks.setdefault(name, torch.ones_like(model.get_parameter(name), dtype=torch.bool))[index] = False
    return masks


def _gate(model: nn.Module, layers: Layers) -> Tensor:
    """1 on the parameters that alone silence a filter, else 0, as the blocks of a vector."""
    names = [name for layer in unit_layers(model) for name in _gate_names(model, layer)]
    return layers.vector({name: torch.ones_like(model.get_parameter(name)) for name in names})


def _gate_names(model: nn.Module, layer: UnitLayer) -> Iterator[str]:
    normalisations = [name for name in layer.modules if hasattr(model.get_submodule(name), "num_features")]
    for module in normalisations[-1:] or [layer.name]:
        yield from (f"{module}.{leaf}" for leaf, _ in model.get_submodule(module).named_parameters(recurse=False))
