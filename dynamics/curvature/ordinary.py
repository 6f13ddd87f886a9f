"""What is ordinary: operations that others may replace, and how their operands and results lie in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def is_transformed() -> bool:
    """Whether something else sees this operation or its derivatives.

    Torch.func or forward-mode differentiation, a checkpoint that will repeat it, or anything that stores tensors, or a
    mode around the whole evaluation.
    """
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether derivatives are taken in many directions at once, of which a function of our own would see but one."""
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def is_ordinary(x: Any, *others: Any) -> bool:
    """Whether all are ordinary real tensors of one type, and stay so; others may be None, where nothing was given."""
    given = [x, *(one for one in others if one is not None)]
    if not all(type(one) in (Tensor, nn.Parameter) for one in given):
        return False
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    alike = all(one.dtype == x.dtype and one.layout is torch.strided for one in given)
    return alike and x.is_floating_point() and not autocast


def memory_format(x: Tensor) -> torch.memory_format:
    """How the results of torch's convolutions and BatchNorm lie in memory, by their input."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x times a mask, with x's own strides."""
    return _with_strides_of(x, x * mask)


def with_masked_gradient(x: Tensor, mask: Tensor) -> Tensor:
    """x itself, whose gradient is masked, with x's own strides."""
    return _with_strides_of(x, x * mask + x.detach() * ~mask)


def _with_strides_of(x: Tensor, y: Tensor) -> Tensor:
    """y as x lies in memory.

    Where a dimension has one entry, a result has other strides, by which torch would choose another kernel for a
    convolution.
    """
    alike = y.stride() == x.stride() or not (y.is_contiguous() and x.is_contiguous())
    return y if alike else y.as_strided(x.shape, x.stride())
