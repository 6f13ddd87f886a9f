"""The geometry of a convolution, and the three bilinear products that make up the convolution and its derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Stride, padding and dilation by dimension, and groups, of y = W ∗ x."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """W ∗ x + bias."""
        return torch.convolution(x, W, bias, *self[:3], False, [0] * len(self.stride), self.groups)

    def transpose(self, d: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """∂⟨d, W ∗ x⟩/∂x, in x's shape; the values of x do not matter."""
        return self._backward(d, x, W, (True, False, False))[0]

    def weight_gradient(self, d: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """∂⟨d, W ∗ x⟩/∂W, in W's shape; the values of W do not matter."""
        return self._backward(d, x, W, (False, True, False))[1]

    def product(self, wanted: str, d: Tensor | None, W: Tensor, x: Tensor) -> Tensor:
        """The derivative of ⟨d, W ∗ x⟩ by ``wanted``: "d", "W" or "x", of which only the shape matters."""
        if wanted == "d":
            return self.forward(x, W)
        return self.transpose(d, x, W) if wanted == "x" else self.weight_gradient(d, x, W)

    def _backward(self, d: Tensor, x: Tensor, W: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
        how = (*self[:3], False, [0] * len(self.stride), self.groups, wanted)
        return torch.ops.aten.convolution_backward(d, x, W, None, *how)


def geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> tuple[Geometry, Tensor] | None:
    """The geometry given by the arguments of ``F.conv1d`` to ``F.conv3d``, and the input.

    The input is padded here where "same" padding is not symmetric. None for an input without a batch dimension, and for
    arguments that torch might refuse.
    """
    size = weight.shape[2:]
    strides, dilations = _each(stride, size), _each(dilation, size)
    if padding == "same" and strides == [1] * len(size) and dilations:
        paddings, input = _same(input, size, dilations)
    else:
        paddings = _each(0 if padding == "valid" else padding, size)
    known = input.ndim == weight.ndim and strides and paddings and dilations
    return (Geometry(strides, paddings, dilations, groups), input) if known else None


def transposed_geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> tuple[Geometry, Tensor] | None:
    """The geometry of the convolution whose transpose ``F.conv_transpose1d`` to ``3d`` computes, and an x of its shape.

    None for an input without a batch dimension, and for arguments that torch might refuse.
    """
    size = weight.shape[2:]
    strides, paddings, more, dilations = (_each(given, size) for given in (stride, padding, output_padding, dilation))
    if input.ndim != weight.ndim or len(weight) != input.shape[1] or not (strides and paddings and more and dilations):
        return None
    if any(extra >= max(s, d) for extra, s, d in zip(more, strides, dilations, strict=True)):
        return None
    lengths = [
        (length - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for length, s, p, d, k, extra in zip(input.shape[2:], strides, paddings, dilations, size, more, strict=True)
    ]
    if min(lengths) < 1:
        return None
    x = input.new_empty(()).expand(len(input), weight.shape[1] * groups, *lengths)
    return Geometry(strides, paddings, dilations, groups), x


def _each(given: Any, size: torch.Size) -> list[int]:
    """One number per dimension; empty if they are not given as torch takes them."""
    numbers = [given] if isinstance(given, int) else list(given) if isinstance(given, tuple | list) else []
    numbers = numbers * len(size) if len(numbers) == 1 else numbers
    return numbers if len(numbers) == len(size) else []


def _same(x: Tensor, size: torch.Size, dilation: list[int]) -> tuple[list[int], Tensor]:
    """Padding on both sides, and x with any extra padding on the right, so that y has the shape of x."""
    total = [step * (length - 1) for step, length in zip(dilation, size, strict=True)]
    more = [number for one in reversed(total) for number in (0, one % 2)]
    return [one // 2 for one in total], F.pad(x, more) if any(more) else x
