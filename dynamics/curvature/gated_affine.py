"""Operations on gated parameters, p = θ + aθ + Σ_k b_k v_k at a = b = 0, differentiated by the layer's gates a and b.

A convolution or a fully connected layer is linear in p, so its derivatives by the gates are inner products of
activations with their cotangents, and no gradient of the weight's shape is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..float64 import widened

_PIECE = 1 << 18  # so many numbers are summed in single precision on a CPU; the sums of pieces, in double


class NestedGradientError(RuntimeError):
    """The loss takes a gradient itself, which makes three derivatives necessary; the operations here have two."""


class Phase:
    """Tells the evaluation of the loss apart from the backward passes after it."""

    evaluating = False

    def require_evaluated(self) -> None:
        """Raise NestedGradientError if a backward pass comes while the loss is being evaluated."""
        if self.evaluating:
            raise NestedGradientError


class Gated(NamedTuple):
    """A parameter θ, its directions v_k (``moves``), and its layer's gates a (``scale``) and b_k (``steps``), all 0."""

    theta: Tensor
    moves: tuple[Tensor, ...]
    scale: Tensor
    steps: tuple[Tensor, ...]

    def slope(self, d: Tensor, p: Tensor) -> Tensor:
        """⟨δ, p⟩ on the gates' device."""
        return inner(d, p).to(self.scale.device)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Gated:
        """The gated parameter f(p), for f linear."""
        return self._replace(theta=function(self.theta), moves=tuple(function(move) for move in self.moves))


@torch.no_grad()
def inner(p: Tensor, q: Tensor) -> Tensor:
    """Re ⟨p, q⟩, a scalar in double precision if the device has it, without a temporary of the operands' size."""
    if p.is_complex():
        p, q = torch.view_as_real(p), torch.view_as_real(q)
    order = sorted(range(p.ndim), key=p.stride, reverse=True)  # in memory order, so that neither is copied
    p, q = (tensor.permute(order).reshape(-1) for tensor in (p, q))
    if p.dtype in (torch.half, torch.bfloat16):
        p, q = p.float(), q.float()
    if p.device.type != "cpu":
        return widened(torch.dot(p, q))
    pieces = zip(p.split(_PIECE), q.split(_PIECE), strict=True)
    return torch.stack([torch.dot(*piece) for piece in pieces]).sum(dtype=torch.float64)


class _Inner(torch.autograd.Function):
    """:func:`inner` with a constant, as a differentiable operation."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, constant: Tensor) -> Tensor:
        ctx.constant = constant
        return inner(d, constant)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        return u.to(ctx.constant.real.dtype) * ctx.constant, None


class Parameter(torch.autograd.Function):
    """p = θ + aθ + Σ_k b_k v_k, for all operations that have no cheaper derivatives here."""

    @staticmethod
    def forward(ctx: Any, gated: Gated, scale: Tensor, *steps: Tensor) -> Tensor:
        """A copy of θ, because an operation may change its parameter in place."""
        ctx.gated = gated
        ctx.set_materialize_grads(False)
        return gated.theta.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        """⟨δ, θ⟩ and ⟨δ, v_k⟩."""
        gated = ctx.gated
        if d is None:
            return (None,) * len(ctx.needs_input_grad)
        # the first backward pass differentiates by b alone, and the second is the last, which records no graph
        by_scale = None if torch.is_grad_enabled() else gated.slope(d, gated.theta)
        return None, by_scale, *(_Inner.apply(d, move).to(gated.scale.device) for move in gated.moves)


class Linear(NamedTuple):
    """A linear operation, (x, W, bias) ↦ Wx + bias, and its transpose, (δ, x, W) ↦ Wᵀδ in the shape of x."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    transpose: Callable[[Tensor, Tensor, Tensor], Tensor]
    channel: int  # the dimension of y along which the bias lies


class Affine(torch.autograd.Function):
    """y = (1+a)(Wx + β) + Σ_k b_k (V_k x + β_k).

    ∂L/∂a = ⟨δ, Wx + β⟩ = ⟨Wᵀδ, x⟩ + ⟨δ, β⟩, so y is not saved and may be overwritten. The parameters are inputs only so
    that a loss that takes its own gradient by them is noticed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        phase: Phase,
        operation: Linear,
        weight: Gated,
        bias: Gated | None,
        x: Tensor,
        *parameters_and_gates: Tensor | None,
    ) -> Tensor:
        """Wx + β; saves V_k x + β_k for the backward pass."""
        shifts = bias.moves if bias else [None] * len(weight.moves)
        moved = [operation.forward(x, move, shift) for move, shift in zip(weight.moves, shifts, strict=True)]
        ctx.save_for_backward(x, *moved)
        ctx.phase, ctx.operation, ctx.weight, ctx.bias = phase, operation, weight, bias
        ctx.set_materialize_grads(False)
        return operation.forward(x, weight.theta, bias.theta if bias else None)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        """Wᵀδ, ⟨δ, V_k x + β_k⟩ and, in the last backward pass only, ∂L/∂a."""
        ctx.phase.require_evaluated()
        none = (None,) * 4
        if d is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *moved = ctx.saved_tensors
        weight, operation = ctx.weight, ctx.operation
        if torch.is_grad_enabled():
            dx, *slopes = _AffineBackward.apply(operation, weight, d, x, weight.scale, *weight.steps, *moved)
            return *none, dx, None, None, None, *slopes
        dx = operation.transpose(d, x, weight.theta) if x.requires_grad else None
        return *none, dx, None, None, _by_scale(ctx, d, x, dx), *(weight.slope(d, one) for one in moved)


def _by_scale(ctx: Any, d: Tensor, x: Tensor, dx: Tensor | None) -> Tensor:
    """∂L/∂a = ⟨δ, Wx + β⟩, from Wᵀδ if that is known."""
    weight, bias, operation = ctx.weight, ctx.bias, ctx.operation
    if dx is None:
        return weight.slope(d, operation.forward(x, weight.theta, bias and bias.theta))
    slope = weight.slope(dx, x)
    if bias is not None:
        others = [dim for dim in range(d.ndim) if dim != operation.channel % d.ndim]
        slope = slope + weight.slope(d.sum(others) if others else d, bias.theta)
    return slope


class _AffineBackward(torch.autograd.Function):
    """(δ, x, a, b) ↦ (1+a)Wᵀδ + Σ_k b_k V_kᵀδ and the slopes ⟨δ, V_k x⟩, of which just one has a cotangent: 1."""

    @staticmethod
    def forward(
        ctx: Any, operation: Linear, weight: Gated, d: Tensor, x: Tensor, *gates_and_moved: Tensor
    ) -> tuple[Tensor | None, ...]:
        moved = gates_and_moved[1 + len(weight.steps) :]
        ctx.save_for_backward(d, x, *moved)
        ctx.operation, ctx.weight = operation, weight
        ctx.set_materialize_grads(False)
        dx = operation.transpose(d, x, weight.theta) if x.requires_grad else None
        return dx, *(weight.slope(d, one) for one in moved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, *ones: Tensor | None) -> tuple[Tensor | None, ...]:
        d, x, *moved = ctx.saved_tensors
        weight, operation = ctx.weight, ctx.operation
        k = next(index for index, one in enumerate(ones) if one is not None)
        by_steps: list[Tensor | None] = [None] * len(ones)
        dx = operation.transpose(d, x, weight.moves[k]) if x.requires_grad else None
        dd, by_scale = moved[k], None
        if u is not None:
            dd = operation.forward(u, weight.theta, None)
            by_scale, by_steps[k] = weight.slope(dd, d), weight.slope(u, dx)
            dd.add_(moved[k])
        return None, None, dd, dx, by_scale, *by_steps, *(None for _ in moved)
