"""Requests for scores, checked so that impossible ones are refused before any data is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...network.wrappers import unwrap
from ..candidates.units import UnitLayer, units_of, weights_left
from ..candidates.weights import weight_of
from .measures import Measure, find_measure


@dataclass(frozen=True)
class Request:
    """The requested measures, a network with its layers from :func:`units_of`, and what measures use without data.

    By layer, for those that have it: γ (``scales``), θ₀ (``initial``), and which weights still read a channel that is
    not pruned (``left``).
    """

    model: nn.Module
    rows: list[Measure]
    granularity: str
    layers: dict[str, UnitLayer | None]
    scales: dict[str, Tensor]
    initial: dict[str, Tensor]
    left: dict[str, Tensor]


def request(
    model: nn.Module,
    batches: Iterable[Any] | None,
    measures: Iterable[str],
    temperature: float,
    mode: str,
    granularity: str,
    protected: Iterable[str],
    initial: Mapping[str, Tensor] | None,
) -> Request:
    """The request that :func:`scores` makes, for several measures.

    Raises:
        ValueError: as :func:`scores`.
    """
    rows = [find_measure(name) for name in measures]
    _check_request(rows, batches, temperature, mode, granularity)
    model = unwrap(model)
    _check_one_device(model)
    layers = units_of(model, granularity, protected)
    _check_not_frozen(model, layers, rows)
    start = initial_weights(model, layers, rows, initial)
    filters = [layer for layer in layers.values() if layer is not None]
    scales = _gammas(model, filters, rows)
    return Request(model, rows, granularity, layers, scales, start, weights_left(model, filters))


def _check_one_device(model: nn.Module) -> None:
    """Raise ValueError if the model's parameters and buffers are not all on one device."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(
            f"the model is on {len(places)} devices ({where}), but scores need it on one: move it with .to()"
        )


def _check_request(
    rows: Sequence[Measure], batches: Iterable[Any] | None, temperature: float, mode: str, granularity: str
) -> None:
    """Raise ValueError if the requested scores are impossible: see :func:`scores`."""
    check_settings(temperature, mode, granularity)
    for row in rows:
        if granularity == "weight" and row.per_filter:
            raise ValueError(f"{row.name} scores whole filters and has no score for single weights")
        if row.needs_data and (batches is None or (isinstance(batches, Sequence) and not batches)):
            raise ValueError(f"{row.name} needs data: pass batches of (inputs, labels), got none")


def check_settings(temperature: float, mode: str, granularity: str) -> None:
    """Raise ValueError if there is no such granularity, mode or temperature."""
    if granularity not in ("filter", "weight") or mode not in ("eval", "train"):
        raise ValueError(
            f"granularity must be 'filter' or 'weight' and mode 'eval' or 'train', got {granularity!r}, {mode!r}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_not_frozen(model: nn.Module, layers: Iterable[str], rows: Sequence[Measure]) -> None:
    """Raise ValueError if a measure uses the gradient of a frozen weight."""
    frozen = [name for name in map(weight_of, layers) if not model.get_parameter(name).requires_grad]
    if frozen and (needing := [row.name for row in rows if row.uses in ("grad", "hess_grad")]):
        raise ValueError(
            f"{needing[0]} is computed from gradients, but {frozen[0]!r} is frozen (requires_grad=False): its "
            "gradient is 0, so it would be pruned first. Name what is frozen in protected=(...), or choose "
            "another measure"
        )


def _gammas(model: nn.Module, layers: Iterable[UnitLayer], rows: Sequence[Measure]) -> dict[str, Tensor]:
    """γ of the normalisation that follows each layer, where there is one.

    Raises:
        ValueError: a measure needs it, and a layer has none.
    """
    followers = {layer.name: layer.normalisation(model) for layer in layers}
    lacking = [name for name, norm in followers.items() if norm is None]
    if lacking and (needing := [row.name for row in rows if row.uses == "scale"]):
        raise ValueError(
            f"{needing[0]} needs a normalisation with a scale γ after every layer that is pruned, but "
            f"{lacking[0]!r} has none after it: name layers without one in protected=(...)"
        )
    found = {name: model.get_submodule(norm) for name, norm in followers.items() if norm is not None}
    return {name: norm.weight for name, norm in found.items()}  # type: ignore[misc]


def initial_weights(
    model: nn.Module, layers: Iterable[str], rows: Sequence[Measure], initial: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """θ₀ of each layer's weight, if a measure needs it.

    Raises:
        ValueError: it is missing, of another shape, or the model's own tensor.
    """
    found = {}
    for row in (row for row in rows if row.needs_initial):
        for name in layers:
            theta, start = model.get_parameter(weight_of(name)), (initial or {}).get(weight_of(name))
            if start is None or start.shape != theta.shape or start.data_ptr() == theta.data_ptr():
                got = "nothing" if start is None else f"shape {tuple(start.shape)}"
                got = "the model's own tensor" if start is not None and start.shape == theta.shape else got
                raise ValueError(
                    f"{row.name} needs θ₀ of {weight_of(name)!r}, of shape {tuple(theta.shape)}, got {got}: pass "
                    "initial=, a copy.deepcopy(model.state_dict()) taken before training"
                )
            found[name] = start.detach().to(theta)
    return found
