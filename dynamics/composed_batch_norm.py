"""BatchNorm put together of elementary operations, which have derivatives of every order; torch's own has two.

Per channel, with m and v the mean and variance of x, y = γ(x − m)/√(v + ε) + β (Ioffe and Szegedy 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ordinary import is_ordinary, memory_format


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``F.batch_norm``, the running statistics included; NotImplemented for all that torch might refuse."""
    statistics = [one for one in (running_mean, running_var) if one is not None]
    if not _is_plain(input, statistics, weight, bias, training) or eps <= 0 or type(momentum) not in (float, int):
        return NotImplemented
    input, channels = input.contiguous(memory_format=memory_format(input)), (-1, *[1] * (input.ndim - 2))
    if training:
        x, mean, variance = _own_statistics(input, statistics, momentum)
    else:
        x, mean, variance = input - running_mean.view(channels), None, running_var
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    shift = bias if mean is None else -mean * scale if bias is None else bias - mean * scale
    y = x * scale.view(channels)
    return y if shift is None else y + shift.view(channels)


def _is_plain(
    input: Tensor, statistics: list[Tensor], weight: Tensor | None, bias: Tensor | None, training: bool
) -> bool:
    given = [*statistics, *(one for one in (weight, bias) if one is not None)]
    return (
        is_ordinary(input, *given)
        and input.dtype in (torch.float32, torch.float64)
        and input.ndim > 1
        and input.numel() >= (2 if training else 1) * input.shape[1] > 0
        and all(one.shape == input.shape[1:2] for one in given)
        and len(statistics) in ((0, 2) if training else (2,))
        and not any(one.requires_grad for one in statistics)
    )


def _own_statistics(input: Tensor, running: list[Tensor], momentum: float) -> tuple[Tensor, Tensor, Tensor]:
    """x less a constant near its mean, its mean then, and its variance; the running statistics move.

    As y does not depend on a constant, nor do its derivatives; and without one no digits cancel.
    """
    over, count = [0, *range(2, input.ndim)], input.numel() // input.shape[1]
    near = input.detach().mean(over, keepdim=True)
    x = input - near
    mean, variance = x.mean(over), x.var(over, correction=0)
    if running:
        for old, new in zip(running, (near.flatten() + mean, variance * count / (count - 1)), strict=True):
            old.mul_(1 - momentum).add_(new.detach(), alpha=momentum)
    return x, mean, variance
