"""What Python objects keep besides parameters and buffers, and how it is put back: in place, as what it was."""

from __future__ import annotations

import functools
import operator
import random
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from numbers import Number
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

PutBack = Callable[[], None]

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}
_OF_OTHERS = (nn.Module, Dataset, DataLoader, Sampler, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_OURS = __name__.partition(".")[0]
_MOST = 10_000  # entries of a container that a function refers to


@dataclass(frozen=True, eq=False)
class Kept:
    """What was kept: how it is put back, and the numbers that were in it, in the order in which they were found."""

    put_back: PutBack
    numbers: list[Any]

    def are_as(self, other: Kept) -> bool:
        """Whether what is kept here and there holds the same numbers."""
        return len(self.numbers) == len(other.numbers) and all(map(_equal, self.numbers, other.numbers))


def kept(modules: Iterable[nn.Module], function: Callable | None = None) -> Kept:
    """Keep the plain attributes of modules and of their classes, and what their forward passes and a function refer to.

    Attributes are put back as the objects they were, and the contents of tensors, arrays, lists, dictionaries, sets,
    deques and random generators, nested ones too, in place: whoever shares such an object goes on sharing it. So are
    those of objects whose class comes from where a module's does, or is the user's own, but for networks, optimizers
    and data. Functions of the user's own may refer to anything: there, what is larger than the modules is left out.
    """
    modules = list(modules)
    keeper = _Keeper(modules)
    parts = [keeper.attributes(module) for module in modules]
    parts += [keeper.of_class(kind) for kind in {type(module) for module in modules} if _is_users(kind.__module__)]
    keeper.most = sum(one.numel() for module in modules for one in module._parameters.values() if one is not None)
    parts.append(keeper.all([*(type(module).forward for module in modules), function]))
    return Kept(_in_turn(parts), keeper.numbers)


def storage(tensor: Tensor | None) -> tuple[str, int]:
    """Which memory a tensor lies in, as far as it can be told."""
    try:
        return "storage", tensor.untyped_storage().data_ptr() or id(tensor)
    except (AttributeError, NotImplementedError, RuntimeError):  # none, sparse, or one that only stands for others
        return "storage", id(tensor)


class _Keeper:
    """Keeps objects, each once. ``most``: how many numbers an array may have, if not any."""

    most: int | None = None

    def __init__(self, modules: list[nn.Module]) -> None:
        self.numbers: list[Any] = []
        self._seen: set[Any] = {storage(one) for module in modules for one in module._parameters.values()}
        self._packages = {_package(type(module)) for module in modules} - {"torch", _OURS}

    def attributes(self, module: nn.Module) -> PutBack:
        """The plain attributes of a module."""
        own = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}
        contents = self.all(own.values())
        self._note(own.values())

        def put_back() -> None:
            now = vars(module)
            for name in now.keys() - own.keys() - _REGISTRIES:
                del now[name]
            now.update(own)
            contents()

        return put_back

    def of_class(self, kind: type) -> PutBack:
        """The data among the attributes of a class."""
        own = _data(kind)
        contents = self.all(own.values())
        self._note(own.values())

        def put_back() -> None:
            for name in _data(kind).keys() - own.keys():
                delattr(kind, name)
            for name, value in own.items():
                if vars(kind).get(name, kind) is not value:
                    setattr(kind, name, value)
            contents()

        return put_back

    def kept(self, value: Any) -> PutBack:
        """What puts the contents of an object back, in place."""
        if id(value) in self._seen or self._is_too_large(value):
            return _nothing
        self._seen.add(id(value))
        if isinstance(value, Tensor):  # one that shares a parameter's memory, as with spectral_norm, is the optimizer's
            return _nothing if storage(value) in self._seen else self._tensor(value)
        if (generator := _as_generator(value)) is not None:
            state, restore = generator
            self.numbers.append(state)
            return lambda: restore(state)
        if isinstance(value, np.ndarray):
            numbers = value.copy()
            self.numbers.append(numbers)
            return lambda: np.copyto(value, numbers) if value.flags.writeable else None
        if isinstance(value, dict):
            return self._container(value, dict(value), list(value.values()), value.update)
        if isinstance(value, list | deque):
            return self._container(value, list(value), list(value), value.extend)
        if isinstance(value, set):
            return self._container(value, set(value), [], value.update)
        if isinstance(value, tuple):
            return self.all(value)
        if isinstance(value, partial):
            return self.all([value.func, *value.args, *value.keywords.values()])
        if isinstance(value, MethodType):
            return self.all([value.__self__, value.__func__])
        if isinstance(value, FunctionType):
            return self._references(value) if _is_users(value.__module__) else _nothing
        return self._object(value) if self._is_own(value) else _nothing

    def all(self, values: Iterable[Any]) -> PutBack:
        """What puts the contents of several back."""
        return _in_turn([self.kept(value) for value in values])

    def _container(self, value: Any, content: Any, inner: list[Any], fill: Callable[[Any], None]) -> PutBack:
        parts = self.all(inner)
        self._note(inner)

        def put_back() -> None:
            if not _are_same(value, content):  # another thread may be reading it
                value.clear()
                fill(content)
            parts()

        return put_back

    def _object(self, value: Any) -> PutBack:
        slots = [name for name in _slots(type(value)) if hasattr(value, name)]
        inner = {name: getattr(value, name) for name in slots}
        own = vars(value) if hasattr(value, "__dict__") else {}
        attributes = self._container(own, dict(own), list(own.values()), own.update)
        in_slots = self.all(inner.values())
        self._note(inner.values())

        def put_back() -> None:
            attributes()
            for name, one in inner.items():
                setattr(value, name, one)
            in_slots()

        return put_back

    def _references(self, function: FunctionType) -> PutBack:
        """What a function refers to: variables of the functions around it, and of its module."""
        cells = [(cell, content) for cell in function.__closure__ or () for content in _contents(cell)]
        everything = function.__globals__
        named = {name: everything[name] for name in _names(function.__code__) if name in everything}
        referred = [*(content for _, content in cells), *named.values()]
        parts = self.all(referred)
        self._note(referred)

        def put_back() -> None:
            for cell, content in cells:
                cell.cell_contents = content
            everything.update(named)
            parts()

        return put_back

    def _tensor(self, tensor: Tensor) -> PutBack:
        if isinstance(tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_inference():
            return _nothing
        with torch.no_grad():
            content, version = tensor.detach().clone(), tensor._version
        self.numbers.append(content)

        @torch.no_grad()
        def put_back() -> None:
            # Torch's BatchNorm changes its statistics without a new version.
            if tensor._version != version or not torch.equal(tensor, content):
                tensor.detach().copy_(content)

        return put_back

    def _note(self, values: Iterable[Any]) -> None:
        self.numbers += [value for value in values if isinstance(value, Number)]

    def _is_own(self, value: Any) -> bool:
        kind = type(value)
        known = _package(kind) in self._packages or _is_users(kind.__module__)
        return known and not isinstance(value, (type, *_OF_OTHERS)) and (hasattr(value, "__dict__") or _slots(kind))

    def _is_too_large(self, value: Any) -> bool:
        if self.most is None:
            return False
        if isinstance(value, Tensor):
            return value.numel() > self.most
        if isinstance(value, np.ndarray):
            return value.size > self.most
        return isinstance(value, list | deque | set | dict | tuple) and len(value) > _MOST


def _as_generator(value: Any) -> tuple[Any, Callable[[Any], None]] | None:
    """The state of a generator of random numbers, and what sets it; None of anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state, partial(setattr, value.bit_generator, "state")
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate(), value.setstate
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two numbers, arrays, or states of generators are the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and one == other


def _in_turn(parts: list[PutBack]) -> PutBack:
    def put_back() -> None:
        for part in parts:
            part()

    return put_back


def _are_same(value: Any, content: Any) -> bool:
    """Whether a container holds the very objects that are its content."""
    if isinstance(value, set):
        return value == content
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(value.get(key, value) is one for key, one in content.items())
    return all(map(operator.is_, value, content))


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@functools.cache
def _is_users(module: str | None) -> bool:
    """Whether a module, by name, is neither Python's, nor installed, nor of this package."""
    name = module or ""
    if name == "__main__":
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or name.partition(".")[0] == _OURS:
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return not installed and not file.startswith(sysconfig.get_path("stdlib"))


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    """What code refers to by name, that of functions in it too."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _data(kind: type) -> dict[str, Any]:
    """The attributes of a class that are neither functions, properties and their like, nor Python's own."""
    return {name: one for name, one in vars(kind).items() if not (name.startswith("__") or hasattr(one, "__get__"))}


def _slots(kind: type) -> list[str]:
    declared = (vars(one).get("__slots__", ()) for one in kind.__mro__)
    names = chain.from_iterable((one,) if isinstance(one, str) else one for one in declared)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _contents(cell: CellType) -> tuple[Any, ...]:
    """Of a variable of a surrounding function, if it has a value yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _nothing() -> None:
    pass
