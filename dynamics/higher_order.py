"""Convolution and BatchNorm with derivatives of every order, each as fast as a first one.

Torch's own convolution in groups goes through them one by one at its second derivative, which is most of the time of a
depthwise one; its BatchNorm has no third derivative in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .convolution import Geometry, geometry


class HigherOrder(TorchFunctionMode):
    """Inside, both are replaced where :func:`is_ordinary` holds; all other operations are torch's own."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = _OWN.get(function)
        if own is not None and not is_transformed():
            result = own(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*args, **(kwargs or {}))


def is_transformed() -> bool:
    """Whether torch.func sees this operation, or a checkpoint that will repeat it, or anything that stores tensors."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or torch._C._functorch.peek_interpreter_stack() is not None


def is_ordinary(x: Any, weight: Tensor) -> bool:
    """Whether both are ordinary real tensors of one type, and stay so."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype
        and x.layout is weight.layout is torch.strided
        and x.is_floating_point()
        and not torch.is_autocast_enabled(x.device.type)
    )


class _Product(torch.autograd.Function):
    """One of a convolution's three products; they are each other's derivatives, for ⟨d, W ∗ x⟩ is linear in each."""

    @staticmethod
    def forward(ctx: Any, how: Geometry, wanted: str, d: Tensor | None, W: Tensor, x: Tensor) -> Tensor:
        """The derivative of ⟨d, W ∗ x⟩ by the ``wanted`` one of "d", "W" and "x", of which only the shape matters."""
        ctx.save_for_backward(d, W, x)
        ctx.how, ctx.wanted = how, wanted
        if wanted == "d":
            return how.forward(x, W)
        return how.transpose(d, x, W) if wanted == "x" else how.weight_gradient(d, x, W)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The same form with the cotangent in the wanted one's place, by each of the two others."""
        operands = dict(zip("dWx", ctx.saved_tensors, strict=True)) | {ctx.wanted: cotangent}
        needed = dict(zip("dWx", ctx.needs_input_grad[2:], strict=True)) | {ctx.wanted: False}
        return None, None, *(_product(ctx.how, one, operands) if needed[one] else None for one in "dWx")


def _product(how: Geometry, wanted: str, operands: Mapping[str, Tensor]) -> Tensor:
    return _Product.apply(how, wanted, *(operands | {wanted: operands[wanted].detach()}).values())


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any, **named: Any) -> Tensor:
    how = geometry(input, weight, *where, **named) if is_ordinary(input, weight) else None
    if how is None:
        return NotImplemented
    y = _Product.apply(how[0], "d", None, weight, how[1])
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [one for one in (running_mean, running_var, weight, bias) if one is not None]
    whole = input.dtype in (torch.float32, torch.float64) and (running_mean is None) == (running_var is None)
    by_batch, count = training or running_mean is None, input.numel() // input.shape[1]
    if not whole or (by_batch and count < 2) or not all(is_ordinary(input, one) for one in (input, *given)):
        return NotImplemented
    mean, variance = running_mean, running_var
    if by_batch:
        over = [0, *range(2, input.ndim)]
        mean, variance = input.mean(over), input.var(over, correction=0)
        if running_mean is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(variance.detach() * count / (count - 1), momentum)
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *[1] * (input.ndim - 2))
    return input * scale.view(shape) + shift.view(shape)


_OWN: dict[Any, Callable[..., Any]] = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.batch_norm: _batch_norm,
}
