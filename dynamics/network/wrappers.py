"""Looks behind what compilation, data parallelism and libraries wrap around a module, or around its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .hooks import hooks_removed


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of compilation, data parallelism and Fabric: only it has second derivatives."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or _is_wrapper(inner):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def _is_wrapper(model: nn.Module) -> bool:
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return parallel or type(model).__name__ == "_FabricModule"


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, runs compiled."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def forward_unwrapped(model: nn.Module) -> Iterator[None]:
    """Inside, the forward pass runs without what libraries wrap around it.

    Accelerate wraps it in an autocast, for mixed precision; Opacus adds hooks that collect the gradients of samples.
    """
    wrapped = {module: module.forward for module in model.modules() if "_original_forward" in vars(module)}
    try:
        for module in wrapped:
            module.forward = vars(module)["_original_forward"]
        with hooks_removed(model, lambda owner: hasattr(owner, "hooks_enabled")):
            yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward
