"""Curvature of each layer along given directions, by gates on the layers instead of Hessian products.

Every layer l gets scalars a_l and b_kl, and its parameters are p = θ + a_l θ + Σ_k b_kl v_k at a = b = 0. Then

    ∂L/∂b_kl = (v_kᵀ∇L)_l,    and for L̇_k = Σ_l ∂L/∂b_kl = v_kᵀ∇L:    ∂L̇_k/∂a_l  = (θᵀHv_k)_l,
                                                                       ∂L̇_k/∂b_kl = (v_kᵀHv_k)_l,

the gradient of a directional derivative (Pearlmutter 1994), taken by the gates alone. In linear operations these are
inner products of activations with their cotangents: no gradient of a weight's shape is formed, which saves the matrix
products that would compute it. For one direction six remain, Wx, Vx, Wᵀδ, Wu, Vᵀδ and Wᵀȳ, twice a gradient's three;
for K directions 2 + 4K.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..float64 import widest
from ..hardware.precision import full_precision
from .expansion import LossFunction
from .gated_affine import Gated, NestedGradientError, Parameter
from .gated_operations import Operations
from .graph import check_differentiable, on_the_way_back
from .higher_order import HigherOrder

Direction = Mapping[str, Tensor] | Sequence[Tensor]


class Products(NamedTuple):
    """The loss, and v_kᵀ∇L, θᵀHv_k and v_kᵀHv_k of each layer, (direction, layer)."""

    loss: Tensor
    slope: Tensor
    param_hess: Tensor
    hess: Tensor


@full_precision()
def gated_products(
    loss_of: LossFunction,
    theta: Mapping[str, Tensor],
    directions: Sequence[Direction],
    layer_of: Mapping[str, int],
    layers: int,
    *,
    frozen: Collection[str] = (),
) -> Products:
    """Exact first and second derivatives of L along each direction v_k, split over the layers; see above.

    ``directions`` are mappings by parameter name or lists in θ's order; ``layer_of`` gives the layer that a parameter
    counts in. Those in ``frozen`` are constants and add nothing. A layer that L does not depend on has zeros. No graph
    is left afterwards, and θ stays as it is. Sums are in double precision if the device has it. A loss that takes
    gradients itself is evaluated twice.

    Raises:
        RuntimeError: an operation of the loss has no second derivative.
    """
    gates = _Gates(theta, directions, layer_of, frozen)
    with torch.enable_grad():
        loss = _evaluate(loss_of, theta, gates.parameters)
        with on_the_way_back(loss, gates.all) as way:
            first = _gradient([loss], [step for steps in gates.steps for step in steps], create_graph=True)
            way.check_whole()
            check_differentiable(slope for slope in first if slope is not None)
            count = len(gates.scale)
            slopes = [first[k * count : (k + 1) * count] for k in range(len(gates.steps))]
            second = [
                _gradient(slope, gates.scale + steps, retain_graph=steps is not gates.steps[-1])
                for slope, steps in zip(slopes, gates.steps, strict=True)
            ]
        way.check_whole()
    by_scale, by_steps = [one[:count] for one in second], [one[count:] for one in second]
    return Products(loss.detach(), *(gates.rows(values, layers) for values in (slopes, by_scale, by_steps)))


def _gradient(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], **how: Any) -> list[Tensor | None]:
    """The gradient of the sum of the outputs by each input; None for an input that they do not depend on."""
    varying = [output for output in outputs if output is not None and output.requires_grad]
    if not varying or not inputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(varying, inputs, allow_unused=True, **how))


class _Gates:
    """The gates a and b_k of the layers that own a parameter, each on its first parameter's device."""

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        directions: Sequence[Direction],
        layer_of: Mapping[str, int],
        frozen: Collection[str],
    ) -> None:
        named = [v if isinstance(v, Mapping) else dict(zip(theta, v, strict=True)) for v in directions]
        free = [name for name, t in theta.items() if name not in frozen and (t.is_floating_point() or t.is_complex())]
        devices: dict[int, torch.device] = {}
        for name in free:
            devices.setdefault(layer_of[name], theta[name].device)
        self._layers = list(devices)
        self._device = next((tensor.device for tensor in theta.values()), torch.device("cpu"))
        self.scale, *self.steps = (
            [torch.zeros((), dtype=widest(on), device=on, requires_grad=True) for on in devices.values()]
            for _ in range(1 + len(named))
        )
        self.parameters: dict[str, Gated] = {}
        for name in free:
            at = self._layers.index(layer_of[name])
            moves = tuple(v[name].detach() for v in named)
            steps = tuple(step[at] for step in self.steps)
            self.parameters[name] = Gated(theta[name].detach(), moves, self.scale[at], steps)

    @property
    def all(self) -> list[Tensor]:
        """All gates, a and then b_1, b_2, ..."""
        return [gate for gates in (self.scale, *self.steps) for gate in gates]

    def rows(self, values: Sequence[Sequence[Tensor | None]], layers: int) -> Tensor:
        """Numbers per gate → (row, layer); 0 for layers without gates and for numbers that are None."""
        zero = torch.zeros((), dtype=widest(self._device), device=self._device)
        rows = []
        for numbers in values:
            row = [zero] * layers
            for layer, number in zip(self._layers, numbers, strict=True):
                row[layer] = zero if number is None else number.detach().to(zero)
            rows.append(torch.stack(row))
        return torch.stack(rows) if rows else zero.new_zeros(0, layers)


def _evaluate(loss_of: LossFunction, theta: Mapping[str, Tensor], gated: Mapping[str, Gated]) -> Tensor:
    """L(p); if the loss takes gradients itself, without the cheaper derivatives, which are only of second order."""
    parameters = {
        name: Parameter.apply(gated[name], gated[name].scale, *gated[name].steps)
        if name in gated
        else tensor.detach().clone()
        for name, tensor in theta.items()
    }
    try:
        return Operations(parameters, gated).evaluate(loss_of, parameters)
    except NestedGradientError:
        with HigherOrder():
            return loss_of(parameters)
