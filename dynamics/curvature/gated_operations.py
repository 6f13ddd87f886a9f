"""Recognises, while a loss is evaluated, the operations that have cheaper or better derivatives than autograd's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .composed import hard_sigmoid, weight_norm
from .convolution import geometry
from .gated_affine import Affine, Gated, Linear, Phase
from .gated_batch_norm import BatchNorm
from .ordinary import is_ordinary, is_transformed


class Operations(TorchFunctionMode):
    """Inside, operations on gated parameters that have cheaper derivatives use them; all others are torch's own.

    Nothing is replaced under autocast, in checkpointed parts, under the transformations of torch.func, or for tensor
    subclasses.
    """

    def __init__(self, parameters: Mapping[str, Tensor], gated: Mapping[str, Gated]) -> None:
        super().__init__()
        self._phase = Phase()
        self._known = {id(parameters[name]): (parameters[name], one) for name, one in gated.items()}

    def evaluate(self, loss_of: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor]) -> Tensor:
        """The loss at the gated parameters."""
        self._phase.evaluating = True
        try:
            with self:
                return loss_of(parameters)
        finally:
            self._phase.evaluating = False

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = _OWN.get(function)
        if own is not None and not is_transformed():
            result = own(self, function, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*args, **(kwargs or {}))

    def find(self, tensor: Any) -> Gated | None:
        """The gated parameter that a tensor stands for; None if it is none."""
        return self._known.get(id(tensor), (None, None))[1]

    def add(self, tensor: Tensor, gated: Gated) -> None:
        """Note that a tensor is a gated parameter; it is kept alive, so that its id stays its own."""
        self._known[id(tensor)] = (tensor, gated)

    def affine(self, operation: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Wx + bias; a bias with another layer's gates, or with none, is added like any other tensor."""
        gated, shift = self.find(weight), self.find(bias)
        together = shift is not None and shift.scale is gated.scale
        inputs = (x, weight, bias if together else None, gated.scale, *gated.steps)
        y = Affine.apply(self._phase, operation, gated, shift if together else None, *inputs)
        if bias is None or together:
            return y
        return y + bias.view((-1,) + (1,) * (y.ndim - 1 - operation.channel % y.ndim))


def _linear(operations: Operations, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if operations.find(weight) is None or not is_ordinary(input, weight):
        return NotImplemented
    return operations.affine(Linear(F.linear, lambda d, x, W: d @ W, channel=-1), input, weight, bias)


def _convolution(
    operations: Operations,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *where: Any,
    **named: Any,
) -> Any:
    known = operations.find(weight) is not None and is_ordinary(input, weight)
    how = geometry(input, weight, *where, **named) if known else None
    if how is None:
        return NotImplemented
    return operations.affine(Linear(how[0].forward, how[0].transpose, channel=1), how[1], weight, bias)


def _batch_norm(
    operations: Operations,
    function: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    own = (training or running_mean is None) and is_ordinary(input, weight, bias)
    own = own and input.device.type == "cpu"  # faster there only, as measured
    if not own or input.dtype not in (torch.float32, torch.float64) or input.numel() <= input.shape[1]:
        return NotImplemented
    return BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)


def _product(operations: Operations, function: Any, input: Any, other: Any) -> Any:
    """A gated parameter times a constant, such as a mask, is a gated parameter, too."""
    gated, constant = operations.find(input), other
    if gated is None:
        gated, constant = operations.find(other), input
    variable = isinstance(constant, Tensor) and (constant.requires_grad or type(constant) not in (Tensor, nn.Parameter))
    if gated is None or variable:
        return NotImplemented
    result = function(input, other)
    if result.shape == gated.theta.shape:
        operations.add(result, gated.mapped(lambda tensor: tensor * constant))
    return result


def _restrided(operations: Operations, function: Any, input: Tensor, *how: Any) -> Any:
    """A gated parameter with other strides is still the same gated parameter."""
    gated = operations.find(input)
    if gated is None:
        return NotImplemented
    result = function(input, *how)
    if result.shape == gated.theta.shape and input.is_contiguous() and result.is_contiguous():
        operations.add(result, gated)
    return result


_OWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    F.hardsigmoid: lambda operations, function, *given, **named: hard_sigmoid(*given, **named),
    torch._weight_norm: lambda operations, function, *given: weight_norm(*given),
    torch.mul: _product,
    Tensor.mul: _product,
    Tensor.as_strided: _restrided,
}
