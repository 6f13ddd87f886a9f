"""A context in which what a network computes has second derivatives: plain kernels, nothing compiled or recomputed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .activations import activations_stay


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Inside, attention uses its plain kernel, the one with a second derivative, and what is compiled runs eagerly.

    No activations are recomputed in backward passes, and a submodule wrapped in DistributedDataParallel runs without
    its wrapper. One thread at a time is inside.
    """
    afresh = mock.patch.object(torch.nn.utils.parametrize, "_cache_enabled", 0)  # the loop may have cached()
    by_itself = mock.patch.object(nn.parallel.DistributedDataParallel, "forward", _by_itself)
    unchosen = mock.patch("torch.nn.attention._sdpa_kernel", _nothing, create=True)  # overrules the model's sdpa_kernel
    with activations_stay(), sdpa_kernel(SDPBackend.MATH), unchosen, afresh, by_itself:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled then, and importing it takes seconds
            yield
        else:
            unasked = mock.patch("torch.nn.modules.module._has_any_global_hook", _no)  # they are ours
            with torch.compiler.set_stance("force_eager"), unasked:
                yield


def _by_itself(replica: nn.parallel.DistributedDataParallel, *inputs: Any, **named: Any) -> Any:
    """Replaces a replica's forward pass, which would expect a backward pass, and add up that of the next batch."""
    return replica.module(*inputs, **named)


def _nothing(*anything: Any, **named: Any) -> None:
    pass


def _no() -> bool:
    return False
