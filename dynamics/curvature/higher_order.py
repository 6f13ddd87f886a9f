"""Convolutions, normalisations and others whose derivatives of every order are right, and as fast as the first.

The second derivative of torch's grouped convolution loops over the groups, which takes most of the time in a depthwise
one; a transposed convolution with output padding has no third derivative. For the others see :mod:`.composed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .composed import batch_norm, hard_sigmoid, instance_norm, layer_norm, weight_norm
from .convolution import Geometry, geometry, transposed_geometry
from .ordinary import is_batched, is_ordinary, is_transformed, memory_format


class HigherOrder(TorchFunctionMode):
    """Inside, these operations replace torch's for ordinary operands and contexts; all others are torch's own."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = _OWN.get(function)
        if own is not None and not is_transformed():
            result = own(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return function(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """One of a convolution's three products, each other's derivatives because ⟨d, W ∗ x⟩ is linear in each operand."""

    @staticmethod
    def forward(ctx: Any, how: Geometry, wanted: str, d: Tensor | None, W: Tensor, x: Tensor) -> Tensor:
        """See :meth:`Geometry.product`."""
        ctx.save_for_backward(d, W, x)
        ctx.how, ctx.wanted = how, wanted
        return how.product(wanted, d, W, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of ⟨d, W ∗ x⟩, with the cotangent in place of ``wanted``, by each of the two other operands."""
        operands = dict(zip("dWx", ctx.saved_tensors, strict=True)) | {ctx.wanted: cotangent}
        needed = dict(zip("dWx", ctx.needs_input_grad[2:], strict=True)) | {ctx.wanted: False}
        return None, None, *(_product(ctx.how, one, operands) if needed[one] else None for one in "dWx")


def _product(how: Geometry, wanted: str, operands: dict[str, Tensor]) -> Tensor:
    product = how.product if is_batched(*operands.values()) else partial(_Product.apply, how)
    return product(wanted, *(operands | {wanted: operands[wanted].detach()}).values())


def _convolution(
    dimensions: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any, **named: Any
) -> Tensor:
    known = _is_known(dimensions, input, weight, bias) and (bias is None or bias.shape == weight.shape[:1])
    how = geometry(input, weight, *where, **named) if known else None
    return NotImplemented if how is None else _shifted(_Product.apply(how[0], "d", None, weight, how[1]), bias)


def _transposed_convolution(
    dimensions: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, *where: Any, **named: Any
) -> Tensor:
    known = _is_known(dimensions, input, weight, bias)
    how = transposed_geometry(input, weight, *where, **named) if known else None
    if how is None or (bias is not None and bias.shape != how[1].shape[1:2]):
        return NotImplemented
    y = _Product.apply(how[0], "x", input, weight, how[1])
    return _shifted(y.contiguous(memory_format=memory_format(input)), bias)


def _is_known(dimensions: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return is_ordinary(input, weight, bias) and weight.ndim == dimensions + 2


def _shifted(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.view(-1, *[1] * (y.ndim - 2))


_OWN: dict[Any, Callable[..., Any]] = {
    F.conv1d: partial(_convolution, 1),
    F.conv2d: partial(_convolution, 2),
    F.conv3d: partial(_convolution, 3),
    F.conv_transpose1d: partial(_transposed_convolution, 1),
    F.conv_transpose2d: partial(_transposed_convolution, 2),
    F.conv_transpose3d: partial(_transposed_convolution, 3),
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.hardsigmoid: hard_sigmoid,
    torch._weight_norm: weight_norm,
}
