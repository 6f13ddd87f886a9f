"""Lends modules copies of their tensors for a while: what is written to these, or saved by a graph, is not theirs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .contents import PutBack, save_tensor
from .equality import are_equal
from .kept import Kept, kept

Tensors = Mapping[str, Tensor | None]


class Guard:
    """A module's own buffers, and its attributes as they are now; meanwhile it may be lent copies of the buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self._attributes = module, Kept([])
        self._own: dict[str, Tensor | None] = {}
        with suppress(Exception):  # a module may be anything
            self._attributes = kept([module], bounded=True, afterwards=True)
            self._own = dict(module._buffers)

    def lend(self, same: dict[int, Tensor]) -> None:
        """Give the module copies; ``same`` are those already made, by the id of their original, which may be shared."""
        with suppress(Exception):
            for name, one in own_of(self._own).items():
                if one is not None:
                    self.module._buffers[name] = same.setdefault(id(one), _copy(one))

    def has_changed(self) -> bool:
        """Whether buffers or attributes have changed since."""
        now = self.module._buffers
        same = all(one is None or are_equal(now.get(name), one) for name, one in self._own.items())
        return not (same and self._attributes.now().are_as(self._attributes))

    def put_back(self) -> None:
        """Give the module its own buffers and its attributes back."""
        self.module._buffers.update(self._own)
        self._attributes.put_back()

    @torch.no_grad()
    def leave(self) -> None:
        """Give the module its own buffers back, with what was written to the copies; another thread has run it."""
        now = dict(self.module._buffers)
        self.module._buffers.update(self._own)
        for name, one in self._own.items():
            if one is not None and one.shape == getattr(now.get(name), "shape", None):
                one.copy_(now[name])


def may_keep(module: nn.Module) -> bool:
    """Whether a module may keep state from one run to the next."""
    return bool(module._buffers) or type(module).__module__.partition(".")[0] != "torch"


def own_of(tensors: Tensors) -> Tensors:
    """A module's own tensors: leaves, not results of operations that torch.func.functional_call has put there."""
    return {name: one for name, one in tensors.items() if one is None or one.is_leaf}


def copies(tensors: Tensors) -> dict[str, Tensor | None]:
    """A copy of each tensor; parameters stay parameters."""
    return {name: None if tensor is None else _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    own = tensor.detach().clone()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def lent(table: dict[str, Any], tensors: Tensors) -> PutBack:
    """Put copies of tensors into a module's table; returns a function that puts its own back.

    Copying into the module's own tensors would invalidate graphs that have saved them for their backward passes.
    """
    own = own_of(table)
    if not isinstance(table, dict):  # that of a scripted module, whose tensors cannot be exchanged
        return Kept([partial(save_tensor, one) for one in own.values() if one is not None]).put_back
    return put(table, copies({name: one for name, one in tensors.items() if name in own}))


def put(table: dict[str, Any], tensors: Tensors) -> PutBack:
    """Put tensors into a module's table in place of its own; returns a function that puts these back."""
    own = {name: table[name] for name in tensors}
    if not own:
        return _nothing
    table.update(tensors)
    return lambda: table.update(own)


def _nothing() -> None:
    pass
