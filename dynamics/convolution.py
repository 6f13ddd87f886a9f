"""What a convolution is besides its two operands, and the three bilinear products that it and its derivatives are."""

from __future__ import annotations

from typing import NamedTuple

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
        """∂⟨d, W ∗ x⟩/∂x, of x's shape; no value of x matters."""
        return self._backward(d, x, W, (True, False, False))[0]

    def weight_gradient(self, d: Tensor, x: Tensor, W: Tensor) -> Tensor:
        """∂⟨d, W ∗ x⟩/∂W, of W's shape; no value of W matters."""
        return self._backward(d, x, W, (False, True, False))[1]

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
    """The geometry of ``F.conv2d``'s arguments and its kin's, and the input, padded where "same" is not symmetric.

    None for an input without a batch, and for arguments that torch refuses.
    """
    size = weight.shape[2:]
    if input.ndim != weight.ndim:
        return None
    stride, dilation = _each(stride, len(size)), _each(dilation, len(size))
    if padding == "same":
        if any(one != 1 for one in stride):
            return None
        padding, input = _same(input, size, dilation)
    padding = _each(0 if padding == "valid" else padding, len(size))
    return Geometry(stride, padding, dilation, groups), input


def _each(number: int | tuple[int, ...], dimensions: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * dimensions if len(numbers) == 1 else numbers


def _same(x: Tensor, size: torch.Size, dilation: list[int]) -> tuple[list[int], Tensor]:
    """Padding on both sides, and x with what is more on the right, so that y has the shape of x."""
    total = [step * (length - 1) for step, length in zip(dilation, size, strict=True)]
    more = [number for one in reversed(total) for number in (0, one % 2)]
    return [one // 2 for one in total], F.pad(x, more) if any(more) else x
