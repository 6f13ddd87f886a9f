"""BatchNorm in training mode, with a second derivative that takes two passes over the activations.

Per channel, over n numbers: x̂ = s(x − μ), y = γx̂ + β. With Pδ = δ − m(δ) − x̂ m(x̂δ), where m is the mean,
∂x = γs Pδ, ∂γ = Σδx̂, ∂β = Σδ (Ioffe and Szegedy 2015). P is symmetric, so for cotangents u, u_γ, u_β of these

    ∂δ = γs Pu + u_γ x̂ + u_β,    ∂γ = s⟨u, Pδ⟩,    ∂x = s Ph − γs² x̂ ⟨u, Pδ⟩ / n,
    h  = (u_γ − γs m(x̂u)) δ − γs m(x̂δ) u,         ⟨u, Pδ⟩ / n = m(uδ) − m(u) m(δ) − m(x̂u) m(x̂δ):

sums of δ, u and x − μ, each times one number per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = 1 << 18  # so many numbers of each activation are processed at once on a CPU, to stay in its cache
_backward = torch.ops.aten.native_batch_norm_backward


class BatchNorm(torch.autograd.Function):
    """y = γx̂ + β, differentiable twice; updates the running statistics as torch does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Torch's own forward pass."""
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x, ∂γ, ∂β."""
        if d is None:
            return (None,) * 6
        grads = _BatchNormBackward.apply(d, *ctx.saved_tensors, ctx.eps)
        needed = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:3], strict=True)]
        return *needed, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """(δ, x, γ) ↦ γs Pδ, Σδx̂, Σδ."""

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        outputs = (x.requires_grad, True, True)
        dx, dweight, dbias = _backward(d, x, weight, None, None, mean, invstd, True, eps, outputs)
        ctx.save_for_backward(d, x, weight, mean, invstd, dweight, dbias)
        ctx.set_materialize_grads(False)
        return dx if x.requires_grad else None, dweight, dbias

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u: Tensor | None, u_weight: Tensor | None, u_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d, x, weight, mean, invstd, dweight, dbias = ctx.saved_tensors
        zeros = torch.zeros_like(invstd)
        sums = _sums(u, d, x, mean, invstd) if u is not None else (zeros, zeros, zeros)
        means = [total / (x.numel() / len(mean)) for total in (*sums, dbias, dweight)]
        gamma = torch.ones_like(invstd) if weight is None else weight
        of_d, of_x, by_weight = _coefficients(
            means, gamma, invstd, zeros if u_weight is None else u_weight, zeros if u_bias is None else u_bias
        )
        dd, dx = _combine(d, x, u, mean, of_d, of_x if x.requires_grad else None)
        return dd, dx, None if weight is None else by_weight * (x.numel() / len(mean)), None, None, None


def _sums(u: Tensor, d: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σu, Σux̂ and Σuδ of each channel, as torch's BatchNorm backward computes them; for the last, δ replaces x̂."""
    sums, zero, one = (False, True, True), torch.zeros_like(mean), torch.ones_like(mean)
    _, normed, plain = _backward(u, x, None, None, None, mean, invstd, True, 0.0, sums)
    _, product, _ = _backward(u, d, None, None, None, zero, one, True, 0.0, sums)
    return plain, normed, product


def _coefficients(
    means: Sequence[Tensor], gamma: Tensor, s: Tensor, u_weight: Tensor, u_bias: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Coefficients of ∂δ for (1, u, x−μ) and of ∂x for (1, δ, u, x−μ), and ∂γ/n, from m of u, x̂u, uδ, δ, x̂δ."""
    u, xu, ud, d, xd = means
    product = ud - u * d - xu * xd
    by_d, by_u = u_weight - gamma * s * xu, -gamma * s * xd
    h, xh = by_d * d + by_u * u, by_d * xd + by_u * xu
    of_d = (u_bias - gamma * s * u, gamma * s, s * by_d)
    of_x = (-s * h, s * by_d, s * by_u, -s.square() * (xh + gamma * s * product))
    return of_d, of_x, s * product


def _combine(
    d: Tensor, x: Tensor, u: Tensor | None, mean: Tensor, of_d: Sequence[Tensor], of_x: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """∂δ and ∂x from their coefficients, piece by piece."""
    channels = (1, -1) + (1,) * (x.ndim - 2)
    mean, *of_d = (number.view(channels) for number in (mean, *of_d))
    of_x = [number.view(channels) for number in of_x or ()]
    dd, dx = torch.empty_like(d), torch.empty_like(x) if of_x else None
    size = max(1, _PIECE * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
    for start in range(0, len(x), size):
        d_part, u_part, dd_part, dx_part = (
            tensor if tensor is None else tensor[start : start + size] for tensor in (d, u, dd, dx)
        )
        centred = x[start : start + size] - mean
        _sum(dd_part, of_d[0], (u_part, of_d[1]), (centred, of_d[2]))
        if of_x:
            _sum(dx_part, of_x[0], (d_part, of_x[1]), (u_part, of_x[2]), (centred, of_x[3]))
    return dd, dx


def _sum(into: Tensor, constant: Tensor, *terms: tuple[Tensor | None, Tensor]) -> None:
    """Write the constant plus each tensor times its coefficient into ``into``; None counts as zero."""
    first, *others = (term for term in terms if term[0] is not None)
    torch.addcmul(constant, *first, out=into)
    for tensor, number in others:
        into.addcmul_(tensor, number)
