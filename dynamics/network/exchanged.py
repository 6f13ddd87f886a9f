"""Puts other tensors in place of a model's parameters and buffers, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has ``tensors``, by parameter and buffer name, instead of its own; afterwards its own again.

    Submodules that a forward pass adds or replaces inside are reset afterwards, too. What is noted on a parameter, such
    as its layer's width, is noted on the other tensor, too.

    A parameter that occurs in several places is exchanged in all of them, also where its module occurs twice: with
    ``torch.func.functional_call`` (PyTorch 2.14), a module that a model holds twice keeps the other tensors for good.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    others = {id(one): tensors[name] for name, one in named if name in tensors}
    tables = [table for module in model.modules() for table in _tables(module)]
    own = [dict(table.items()) for table in tables]
    for one in (one for _, one in named if id(one) in others):
        other = vars(others[id(one)])
        other.update({name: value for name, value in noted_on(one).items() if name not in other})
    try:
        for table, before in zip(tables, own, strict=True):
            for name in (name for name, one in before.items() if id(one) in others):
                table[name] = others[id(before[name])]
        yield
    finally:
        for table, before in zip(tables, own, strict=True):
            for name in [name for name, _ in table.items() if name not in before]:
                del table[name]
            for name, one in before.items():
                table[name] = one


def noted_on(parameter: Tensor) -> dict[str, Any]:
    """What others have set on a parameter as attributes, except tensors: these may be copies of it, which move on."""
    return {name: value for name, value in vars(parameter).items() if not isinstance(value, Tensor)}


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    tensors = module._parameters, module._buffers
    return tensors if isinstance(module, torch.jit.ScriptModule) else (*tensors, module._modules)
