"""The structure of a network (modules, parameters, buffers and hooks), kept so that it can be restored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

_TABLES = ("_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")


class _OfModule(NamedTuple):
    """A module's class and tables; ``computed``: that class's properties, if a parametrization has made the class."""

    kind: type
    tables: dict[str, dict[Any, Any]]
    computed: dict[str, property] | None


class Structure:
    """The present structure of a network, whatever ``torch.nn.utils.prune``, say, replaces in it later."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if all(name in vars(module) for name in _TABLES)]
        self._kept = [self._of(module) for module in self._modules]

    @staticmethod
    def _of(module: nn.Module) -> _OfModule:
        kind, tables = type(module), {name: dict(vars(module)[name]) for name in _TABLES}
        return _OfModule(kind, tables, _properties(kind) if is_parametrized(module) else None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the network has the kept structure; afterwards again the one it had before."""
        now = [self._of(module) for module in self._modules]
        try:
            self._put(self._kept)
            yield
        finally:
            self._put(now)

    def _put(self, kept: list[_OfModule]) -> None:
        for module, (kind, tables, computed) in zip(self._modules, kept, strict=True):
            if type(module) is not kind:  # a parametrization changes the class
                module.__class__ = kind
            if computed is not None:  # and a further one, or its removal, the properties of that class
                for name in _properties(kind).keys() - computed.keys():
                    delattr(kind, name)
                for name, one in computed.items():
                    setattr(kind, name, one)
            for name, content in tables.items():
                table = vars(module)[name]
                table.clear()
                table.update(content)


def _properties(kind: type) -> dict[str, property]:
    return {name: one for name, one in vars(kind).items() if isinstance(one, property)}


def has_any(model: nn.Module, parameters: Iterable[Tensor]) -> bool:
    """Whether one of these tensors is a parameter of the model."""
    return not set(map(id, model.parameters())).isdisjoint(map(id, parameters))


def is_scripted(model: nn.Module) -> bool:
    """Whether any part of a model is a ScriptModule, which hides what it computes."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


def check_initialised(model: nn.Module) -> None:
    """Raise ValueError if a lazy module has no parameters yet, or none of the model's parameters has numbers."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run a batch through the model first")
    if (first := next(model.named_parameters(), None)) and all(one.is_meta for one in model.parameters()):
        raise ValueError(
            f"parameter {first[0]!r} is on the meta device and has no values yet: initialise the model first, with "
            "model.to_empty(device=...) and its own reset_parameters() or a checkpoint"
        )


def check_whole(model: nn.Module, what: str) -> None:
    """Raise ValueError if a model is sharded over processes; ``what`` has to be done before that."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):
            raise ValueError(f"{name} is sharded over processes (FSDP2): {what} the model before sharding it")
