"""float64 where the device has it, as Apple's GPUs have not: for sums, and for what is compared."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64; Apple's GPUs and some of Intel's do not."""
    try:
        torch.ones(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """float64 if the device has it, else float32: the data type of sums."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64 if its device has it, else in float32."""
    return tensor.to(widest(tensor.device))
