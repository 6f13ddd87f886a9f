"""Synaptic flow: the output of a network with absolute parameters for an input of ones. It uses no data.

R = 1ᵀ f(1; |θ|), and a weight's share of it is |θ| ∂R/∂|θ|; without biases, the shares of each layer add up to R.
Source: Tanaka et al., NeurIPS 2020, section 5, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import named
from ...float64 import widened, widest
from ...hardware.random_numbers import random_numbers_untouched
from ...network.exchanged import exchanged
from ...probing.activations import activations_stay
from ...probing.mode import mode_of


def flow_gradient(model: nn.Module, shape: Sequence[int]) -> dict[str, Tensor]:
    """∂R/∂|θ| by parameter name, for one input of ones of ``shape`` (without the batch).

    BatchNorm is as in the paper's code: in eval mode, with |γ|, |β| and the absolute values of its running statistics.
    Everything is in float64 if the device has it, since R grows with the product of all layers' norms. Pruned
    parameters are zero.

    Raises:
        ValueError: the model does not run on such an input.
    """
    device = next(model.parameters()).device
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    positive = {name: widened(tensor.detach().abs()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    theta = {name: positive[name].requires_grad_() for name, _ in model.named_parameters()}
    ones = torch.ones(1, *shape, dtype=widest(device), device=device)
    with torch.enable_grad(), random_numbers_untouched(device), mode_of(model, "eval"), activations_stay():
        with exchanged(model, positive):
            flow = _flow(model, ones)
        grad = torch.autograd.grad(flow, list(theta.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(theta, grad, strict=True))


def _flow(model: nn.Module, ones: Tensor) -> Tensor:
    try:
        return model(ones).sum()
    except Exception as error:
        raise ValueError(
            f"synflow runs the model on one input of ones, of type {ones.dtype} and shape {tuple(ones.shape[1:])}, "
            f"which failed with {named(error)}: choose another measure"
        ) from error
