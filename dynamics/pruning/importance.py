"""Scores of a network's filters by a measure, from data that streams through in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moment import random_numbers_untouched
from ..probe import Probe, cross_entropy_objective, mode_of, sample_count, to_device, unwrap
from .measures import Evidence, Measure, find_measure
from .units import UnitLayer, unit_layers


def scores(
    model: nn.Module,
    batches: Iterable[Any] | None,
    measure: str,
    *,
    temperature: float = 1.0,
    mode: str = "eval",
    granularity: str = "filter",
) -> dict[str, Tensor]:
    """Importance of every filter, (filter,), by the name of its convolution; the lowest are pruned first.

    Args:
        model: convolutions followed by what torch.fx can trace. It is left as it is.
        batches: ``(inputs, labels)`` batches; the loss is their mean cross-entropy of logits / temperature. A measure
            of order 0 needs none (None).
        measure: a name from :data:`MEASURES`, which holds each one's formula.
        temperature: T. The paper's is ``MEASURES[measure].temperature``.
        mode: "eval" (the paper's) or "train": how BatchNorm and dropout behave while the loss is evaluated.
        granularity: "filter", or "weight" for a score of every weight, in the weight's shape.

    Depthwise convolutions have no scores: they go with the layer that feeds them. Source: Lubana & Dick, ICLR 2021,
    sections 3 and 4; Molchanov et al. 2019 for taylor and fisher; Wang et al. 2020 for GraSP.

    Raises:
        ValueError: unknown measure, mode or granularity, a temperature that is not positive, or no data where the
            measure needs some.
    """
    row = find_measure(measure)
    batches = _checked(row, batches, temperature, mode, granularity)
    model = unwrap(model)
    layers = unit_layers(model)
    with torch.no_grad():
        evidence = _evidence(row, model, layers, batches, temperature, mode)
        entries = {name: row.entries(found) for name, found in evidence.items()}
        if granularity == "weight":
            return entries
        return {name: row.combine(values.reshape(len(values), -1)) for name, values in entries.items()}


def _checked(row: Measure, batches: Iterable[Any] | None, temperature: float, mode: str, granularity: str) -> list[Any]:
    if granularity not in ("filter", "weight") or mode not in ("eval", "train"):
        raise ValueError(
            f"granularity is 'filter' or 'weight' and mode 'eval' or 'train'; got {granularity!r}, {mode!r}"
        )
    if granularity == "weight" and row.per_filter:
        raise ValueError(f"{row.name} scores whole filters; it has no score for single weights")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    batches = list(batches) if batches is not None else []
    if not batches and (row.order > 0 or row.name == "fisher"):
        raise ValueError(f"{row.name} needs data: pass batches of (inputs, labels), got none")
    return batches


def _evidence(
    row: Measure, model: nn.Module, layers: list[UnitLayer], batches: list[Any], temperature: float, mode: str
) -> dict[str, Evidence]:
    grad, hess_grad, squares = {}, {}, {}
    if row.name == "fisher":
        squares = _squared_sample_grads(model, layers, batches, temperature, mode)
    elif row.order > 0:
        expansion = Probe(model, partial(cross_entropy_objective, temperature=temperature), batches, mode=mode).expand()
        grad = dict(zip(expansion.theta, expansion.grad, strict=True))
        if row.order > 1:
            hess_grad = dict(zip(expansion.theta, expansion.hessian_product(expansion.grad), strict=True))
    return {
        layer.name: Evidence(
            theta=model.get_submodule(layer.name).weight.detach(),
            grad=grad.get(f"{layer.name}.weight"),
            hess_grad=hess_grad.get(f"{layer.name}.weight"),
            scale=_scale_of(model, layer),
            squared_sample_grad=squares.get(layer.name),
        )
        for layer in layers
    }


def _scale_of(model: nn.Module, layer: UnitLayer) -> Tensor | None:
    name = layer.normalisation(model)
    return None if name is None else model.get_submodule(name).weight


def _squared_sample_grads(
    model: nn.Module, layers: list[UnitLayer], batches: list[Any], temperature: float, mode: str
) -> dict[str, Tensor]:
    """Mean over samples n of (θ_fᵀ g_n)², where g_n is the gradient of sample n's loss.

    A gate of ones on the convolution's output (before its bias) has the gradient θ_fᵀ g_n, since the output is linear
    in the filter. Samples are independent in eval mode; in train mode BatchNorm couples them, and g_n is then the
    gradient through sample n's own outputs.
    """
    device = next(model.parameters()).device
    sums = {layer.name: torch.zeros(layer.filters, device=device) for layer in layers}
    samples = 0
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for batch in batches:
            count = sample_count(batch)
            with random_numbers_untouched(device), mode_of(model, mode), _gates(model, layers, count) as gates:
                with torch.enable_grad():
                    loss = cross_entropy_objective(model, to_device(batch, device), temperature) * count
                parts = torch.autograd.grad(loss, list(gates.values()))
            for name, part in zip(gates, parts, strict=True):
                sums[name] += part.square().sum(0)
            samples += count
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: total / samples for name, total in sums.items()}


@contextmanager
def _gates(model: nn.Module, layers: list[UnitLayer], count: int) -> Iterator[dict[str, Tensor]]:
    """Inside, each ranked convolution's output, without its bias, is multiplied by a gate of ones (sample, filter)."""
    gates, hooks = {}, []

    def gated(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor, gate: Tensor) -> Tensor:
        bias = 0 if module.bias is None else module.bias[:, None, None]
        return (output - bias) * gate[:, :, None, None] + bias

    for layer in layers:
        module = model.get_submodule(layer.name)
        gates[layer.name] = torch.ones(count, layer.filters, device=module.weight.device, requires_grad=True)
        hooks.append(module.register_forward_hook(partial(gated, gate=gates[layer.name])))
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()
