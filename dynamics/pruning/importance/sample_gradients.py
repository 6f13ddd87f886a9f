"""Gradients of single samples' losses along each filter, from one backward pass of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...hardware.precision import full_precision
from ...hardware.random_numbers import random_numbers_untouched
from ...network.hooks import unlogged
from ...network.identities import Layer, layer_named
from ...probing.activations import activations_stay
from ...probing.mode import mode_of
from ...probing.objective import Objective


@full_precision()
def squared_sample_grads(
    model: nn.Module, layers: list[str], count: int, objective: Objective, mode: str
) -> dict[str, Tensor]:
    """Σ over a batch's samples n of (θ_fᵀ g_n)², (filter,), where g_n is the gradient of sample n's loss.

    ``objective(model, None)`` is the mean loss of the batch's ``count`` samples.

    The layer's output, before its bias, is linear in the filter; so the gradient by a gate of ones on it, (sample,
    filter), is θ_fᵀ g_n. Samples are independent in eval mode; in train mode BatchNorm couples them, and g_n is then
    the gradient through sample n's own outputs. Source: Molchanov et al. 2019; Theis et al. 2018.
    """
    device = next(model.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with random_numbers_untouched(device), mode_of(model, mode), _gates(model, layers, count) as gates:
            with torch.enable_grad(), activations_stay(), unlogged(model):
                loss = objective(model, None) * count
            parts = torch.autograd.grad(loss, list(gates.values()), allow_unused=True, materialize_grads=True)
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: part.square().sum(0) for name, part in zip(gates, parts, strict=True)}


@contextmanager
def _gates(model: nn.Module, layers: list[str], count: int) -> Iterator[dict[str, Tensor]]:
    """Inside, each layer's output, without its bias, is multiplied by a gate of ones (sample, filter)."""
    gates: dict[str, Tensor] = {}

    def gated(name: str, module: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if len(output) != count:
            raise ValueError(
                f"fisher needs the gradients of single samples, but layer {name!r} gives {len(output)} outputs "
                f"for a batch of {count}: choose another measure"
            )
        gate = gates[name]
        filters_at = output.ndim - 1 if isinstance(module, nn.Linear) else 1
        shape = [gate.shape[1] if axis == filters_at else 1 for axis in range(output.ndim)]
        bias = 0 if module.bias is None else module.bias.view(shape)
        return (output - bias) * gate.view(count, *shape[1:]) + bias

    with ExitStack() as hooks:
        for name in layers:
            weight = layer_named(model, name).weight
            gates[name] = torch.ones(count, len(weight), device=weight.device, dtype=weight.dtype, requires_grad=True)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(gated, name)))
        yield gates
