"""How long a forward pass takes: silenced filters still cost time, shrunk ones do not."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from ..probing.mode import mode_of
from .call import call


@torch.no_grad()
def latency(model: nn.Module, inputs: Any, *, repeats: int = 20, warm_up: int = 3) -> float:
    """Seconds of a forward pass in eval mode: the median of ``repeats``, after ``warm_up`` passes that do not count.

    On a GPU each pass is waited for, so one batch at a time is measured. ``inputs``, as :func:`shrink` takes
    them, must be on the model's device.
    Compare networks alternately, in one process: other programs and clock rates change the speed of a machine.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    device = next(model.parameters()).device
    with mode_of(model, "eval"):
        return statistics.median([_seconds(model, inputs, device) for _ in range(warm_up + repeats)][warm_up:])


def _seconds(model: nn.Module, inputs: Any, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call(model, inputs)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
