"""Operations composed of elementary ones, so that their derivatives are right at every order.

Torch's own normalisations have two (BatchNorm, in training mode), a wrong third one (LayerNorm), a wrong second one
(weight norm); its hard sigmoid has one. With m and v the mean and variance of x, y = γ(x − m)/√(v + ε) + β (Ioffe and
Szegedy 2015, Ba et al. 2016); a weight is w = g v/‖v‖ (Salimans and Kingma 2016); a hard sigmoid is min(max(x + 3, 0),
6)/6. Each takes the arguments of torch's function, and returns NotImplemented for any that torch might refuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    """As ``F.batch_norm``; updates the running statistics in training mode."""
    running = [one for one in (running_mean, running_var) if one is not None]
    if not _is_plain(input, running, weight, bias, training) or eps <= 0 or type(momentum) not in (float, int):
        return NotImplemented
    input, channels = input.contiguous(memory_format=memory_format(input)), (-1, *[1] * (input.ndim - 2))
    weight, bias, *running = (None if one is None else one.view(channels) for one in (weight, bias, *running))
    if not training:
        return _affine(input - running[0], None, (running[1] + eps).rsqrt(), weight, bias)
    x, near, mean, variance = _statistics(input, [0, *range(2, input.ndim)])
    if running:
        count = input.numel() // input.shape[1]
        for old, new in zip(running, (near + mean, variance * count / (count - 1)), strict=True):
            old.mul_(1 - momentum).add_(new.detach()[0], alpha=momentum)
    return _affine(x, mean, (variance + eps).rsqrt(), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As ``F.instance_norm`` without running statistics: each channel of each sample is normalised by itself."""
    if running_mean is not None or not _is_plain(input, [], weight, bias, training=use_input_stats):
        return NotImplemented
    weight, bias = (None if one is None else one.repeat(len(input)) for one in (weight, bias))
    y = batch_norm(input.reshape(1, -1, *input.shape[2:]), None, None, weight, bias, training=True, eps=eps)
    return NotImplemented if y is NotImplemented else y.view(input.shape)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """As ``F.layer_norm``."""
    given, last = [one for one in (weight, bias) if one is not None], len(normalized_shape)
    whole = is_ordinary(input, *given) and input.dtype in (torch.float32, torch.float64) and input.numel() > 0
    shape = tuple(normalized_shape)
    if not whole or eps <= 0 or not all(one.shape[-last:] == shape for one in (input, *given)) or not last:
        return NotImplemented
    x, _, mean, variance = _statistics(input.contiguous(), list(range(-last, 0)))
    scale = (variance + eps).rsqrt()
    return _affine(_affine(x, mean, scale), None, weight, None, bias)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As ``torch._weight_norm``: with norms over all dimensions but ``dim``, or over all if that is −1."""
    return v * (g / torch.norm_except_dim(v, 2, dim)) if is_ordinary(v, g) else NotImplemented


def hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """As ``F.hardsigmoid``."""
    if not is_ordinary(input):
        return NotImplemented
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _is_plain(input: Tensor, running: list[Tensor], weight: Tensor | None, bias: Tensor | None, training: bool) -> bool:
    given = [*running, *(one for one in (weight, bias) if one is not None)]
    return (
        is_ordinary(input, *given)
        and input.dtype in (torch.float32, torch.float64)
        and input.ndim > 1
        and input.numel() >= (2 if training else 1) * input.shape[1] > 0
        and all(one.shape == input.shape[1:2] for one in given)
        and len(running) in ((0, 2) if training else (2,))
        and not any(one.requires_grad for one in running)
    )


def _statistics(input: Tensor, over: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x minus a constant near its mean, that constant, the mean of the difference, and the variance.

    The constant changes neither y nor its derivatives, and avoids cancellation.
    """
    near = input.detach().mean(over, keepdim=True)
    x = input - near
    return x, near, x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)


def _affine(
    x: Tensor, mean: Tensor | None, scale: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """(x − mean) · scale · weight + bias, where the small factors are multiplied first; None leaves a term out."""
    factors = [one for one in (scale, weight) if one is not None]
    factor = factors[0] * factors[1] if len(factors) == 2 else factors[0] if factors else None
    shift = bias if mean is None else -mean * factor if bias is None else bias - mean * factor
    y = x if factor is None else x * factor
    return y if shift is None else y + shift
