"""The operations of which more is known than autograd's own derivatives, recognised while a loss is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .gated_affine import Affine, Gated, Linear, Phase
from .gated_batch_norm import BatchNorm


class Operations(TorchFunctionMode):
    """Inside, operations on gated parameters that have cheaper derivatives use them; all others are torch's own.

    Nothing is changed under autocast, in checkpointed parts, under the transformations of torch.func, nor for
    subclasses of tensors.
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
        if own is not None and not _transformed():
            result = own(self, function, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*args, **(kwargs or {}))

    def find(self, tensor: Any) -> Gated | None:
        """What a tensor is, if it is a gated parameter."""
        return self._known.get(id(tensor), (None, None))[1]

    def add(self, tensor: Tensor, gated: Gated) -> None:
        """Remember what a tensor is; it is kept, and so is its id."""
        self._known[id(tensor)] = (tensor, gated)

    def affine(self, operation: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Wx + bias; a bias with gates of another layer is added as any other tensor."""
        gated, shift = self.find(weight), self.find(bias)
        together = shift is not None and shift.scale is gated.scale
        inputs = (x, weight, bias if together else None, gated.scale, *gated.steps)
        y = Affine.apply(self._phase, operation, gated, shift if together else None, *inputs)
        if bias is None or together:
            return y
        return y + bias.view((-1,) + (1,) * (y.ndim - 1 - operation.channel % y.ndim))


def _transformed() -> bool:
    """Whether torch.func sees this operation, or a checkpoint that will repeat it, or anything that stores tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or torch._C._functorch.peek_interpreter_stack() is not None


def _plain(x: Any, weight: Tensor) -> bool:
    """Whether both are ordinary real tensors of one type, and stay so."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype
        and x.layout is weight.layout is torch.strided
        and x.is_floating_point()
        and not torch.is_autocast_enabled(x.device.type)
    )


def _linear(operations: Operations, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if operations.find(weight) is None or not _plain(input, weight):
        return NotImplemented
    return operations.affine(Linear(F.linear, lambda d, x, W: d @ W, channel=-1), input, weight, bias)


def _convolution(
    operations: Operations,
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Any:
    if operations.find(weight) is None or not _plain(input, weight) or input.ndim != weight.ndim:
        return NotImplemented
    size = weight.shape[2:]
    stride, dilation = _each(stride, len(size)), _each(dilation, len(size))
    if padding == "same":
        if any(one != 1 for one in stride):
            return NotImplemented  # an error, in torch's words
        padding, input = _same(input, size, dilation)
    padding = _each(0 if padding == "valid" else padding, len(size))

    def forward(x: Tensor, W: Tensor, shift: Tensor | None) -> Tensor:
        return function(x, W, shift, stride, padding, dilation, groups)

    def transpose(d: Tensor, x: Tensor, W: Tensor) -> Tensor:
        how = (stride, padding, dilation, False, [0] * len(size), groups, (True, False, False))
        return torch.ops.aten.convolution_backward(d, x, W, None, *how)[0]

    return operations.affine(Linear(forward, transpose, channel=1), input, weight, bias)


def _each(number: int | tuple[int, ...], dimensions: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _same(x: Tensor, size: torch.Size, dilation: list[int]) -> tuple[list[int], Tensor]:
    """Padding on both sides, and x with what is more on the right, so that y has the shape of x."""
    total = [step * (length - 1) for step, length in zip(dilation, size, strict=True)]
    more = [number for one in reversed(total) for number in (0, one % 2)]
    return [one // 2 for one in total], F.pad(x, more) if any(more) else x


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
    own = (training or running_mean is None) and input.device.type == "cpu"  # where it was measured to be faster
    own = own and all(_plain(input, one) for one in (weight, bias) if one is not None) and _plain(input, input)
    if not own or input.dtype not in (torch.float32, torch.float64) or input.numel() <= input.shape[1]:
        return NotImplemented
    return BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)


def _product(operations: Operations, function: Any, input: Any, other: Any) -> Any:
    """A gated parameter times a constant, such as a mask, is one too."""
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


_OWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.batch_norm: _batch_norm,
    torch.mul: _product,
    Tensor.mul: _product,
}
