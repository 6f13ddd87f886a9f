"""Whether an operation is ordinary, so that another may replace it, and the memory layout of operands and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def is_transformed() -> bool:
    """Whether something else intercepts this operation or its derivatives, which then has to be torch's own.

    This may be torch.func, forward-mode differentiation, hooks on saved tensors (as a checkpoint's, which will repeat
    the operation), or a torch function mode around the whole evaluation.
    """
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


def is_batched(*tensors: Tensor) -> bool:
    """Whether torch.func or vmap may batch the tensors; a custom autograd function would see only one direction."""
    return torch._C._functorch.peek_interpreter_stack() is not None or any(
        torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )


def is_ordinary(x: Any, *others: Any) -> bool:
    """Whether all are plain dense real tensors of one data type, which autocast does not change; None is ignored."""
    given = [x, *(one for one in others if one is not None)]
    if not all(type(one) in (Tensor, nn.Parameter) for one in given):
        return False
    autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    alike = all(one.dtype == x.dtype and one.layout is torch.strided for one in given)
    return alike and x.is_floating_point() and not autocast


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of the results of torch's convolutions and BatchNorm, which follows from the input's."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x times a mask, with x's own strides."""
    return _with_strides_of(x, x * mask)


def with_masked_gradient(x: Tensor, mask: Tensor) -> Tensor:
    """x itself, but with a masked gradient, and with x's own strides."""
    return _with_strides_of(x, x * mask + x.detach() * ~mask)


def _with_strides_of(x: Tensor, y: Tensor) -> Tensor:
    """y with x's strides.

    Where a dimension has one entry, a result's strides may differ from x's, and torch would choose another kernel for a
    convolution by them.
    """
    alike = y.stride() == x.stride() or not (y.is_contiguous() and x.is_contiguous())
    return y if alike else y.as_strided(x.shape, x.stride())
