"""Saves what Python objects hold besides parameters and buffers, and puts it back, in place."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..network.exchanged import noted_on
from .contents import (
    Take,
    are_equal,
    attributes_of,
    data_of,
    may_be_kept,
    may_be_trained,
    storage_of,
    take_array,
    take_attributes,
    take_class,
    take_container,
    take_object,
    take_of_generator,
    take_tensor,
    takes_of_variables,
)
from .ownership import (
    CONTAINERS,
    OF_OTHERS,
    OURS,
    entries,
    held,
    is_users,
    is_users_function,
    manages,
    package,
    passed_on,
)
from .references import methods_of, names_in, referred
from .walk import MOST, walk

_FEW = 2**20  # so many numbers are kept in any case
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
_OF_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinMethodType)
_NESTED = 3  # transforms in transforms


class Kept:
    """The contents of objects as they are now; ``trained`` are tensors that an optimizer may train, and not kept."""

    def __init__(self, takes: list[Take], trained: Iterable[Tensor] = ()) -> None:
        self._trained = [(one, one._version) for one in trained]
        self._takes, self._put_backs, self._numbers = takes, [], []
        for take in takes:
            with suppress(Exception):  # an object may be anything
                put_back, numbers = take()
                self._put_backs.append(put_back)
                self._numbers += numbers

    def put_back(self) -> None:
        """Give each object its contents back. If one fails, the others are put back before its error is raised."""
        with ExitStack() as all_of_them:
            for put_back in self._put_backs:
                all_of_them.callback(put_back)

    @property
    def moved(self) -> list[Tensor]:
        """The tensors that an optimizer may train that have been changed in place since."""
        return [one for one, version in self._trained if one._version != version]

    def now(self) -> Kept:
        """The present contents of the same objects."""
        return Kept(self._takes)

    def are_as(self, other: Kept) -> bool:
        """Whether both hold the same numbers."""
        return len(self._numbers) == len(other._numbers) and all(map(are_equal, self._numbers, other._numbers))


def kept(modules: Iterable[nn.Module], function: Callable | None = None, *, bounded: bool = False) -> Kept:
    """Keep the plain attributes of modules, of their classes and parameters, and what a function refers to.

    Attributes are put back as the same objects. The contents of tensors, arrays, lists, dictionaries, sets, deques and
    random generators, nested ones too, are put back in place: whoever shares such an object goes on sharing it. So are
    the contents of objects whose class comes from the same package as a module's, and of sequences of quasi-random
    numbers. Those of other classes of the user's own are, too, unless they hold networks, optimizers or data; these
    themselves are never kept. Of other objects that can be called, such as a library's transforms, only random
    generators are.

    Of the function, of the modules' forward methods, and of the user's own functions, methods and classes that these
    name, the closure and global variables are kept, if they are numbers, tensors, collections or the user's own
    objects; but not what is trained, nor many more numbers than the modules have parameters, as in a data set. If
    ``bounded``, no more than some objects of the modules are kept, those that lie nearest to them.
    """
    keeper = _Keeper(list(modules), bounded)
    keeper.look_into([] if function is None else [passed_on(function)])
    return Kept(keeper.takes, keeper.trained)


class _Keeper:
    """Finds what is to be kept, each object once; objects that cannot be examined are left alone."""

    def __init__(self, modules: list[nn.Module], bounded: bool) -> None:
        self.takes: list[Take] = []
        self.trained: list[Tensor] = []
        self._seen: set[Any] = {storage_of(one) for module in modules for one in module._parameters.values()}
        self._packages = {package(type(module)) for module in modules} - {"torch", OURS}
        parameters = (one for module in modules for one in module._parameters.values() if one is not None)
        self._room = max(sum(one.numel() for one in parameters), _FEW)
        values: list[Any] = []
        for module in modules:
            self.takes.append(partial(take_attributes, module))
            values += attributes_of(module).values()
            for parameter in (one for one in module._parameters.values() if one is not None):
                values += noted_on(parameter).values()
        own = {type(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)}
        self._kinds = {kind: None for kind in own if is_users(kind)}  # whose methods run
        self._run = {"forward": None, "__call__": None}  # names of methods
        self._beside: list[Any] = []  # functions and classes
        for kind in self._kinds:
            self.takes.append(partial(take_class, kind))
            values += data_of(kind).values()
        walk(values, self._visit_once, bounded=bounded)

    def _visit_once(self, value: Any) -> Iterable[Any]:
        if isinstance(value, FunctionType | MethodType):
            self._beside.append(value)
            return ()
        if id(value) in self._seen:
            return ()
        self._seen.add(id(value))
        return self._visit(value)

    def _visit(self, value: Any) -> Iterable[Any]:
        """Keep an object, and return what is inside it."""
        if type(value) in _PLAIN:
            return ()
        if isinstance(value, Tensor):  # what shares a parameter's memory, as in spectral_norm, is not state
            if storage_of(value) not in self._seen and may_be_kept(value):
                self.trained.append(value) if may_be_trained(value) else self.takes.append(partial(take_tensor, value))
        elif (generator := take_of_generator(value)) is not None:
            self.takes.append(generator)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self.takes.append(partial(take_array, value))
        elif isinstance(value, dict | list | deque | set):
            self.takes.append(partial(take_container, value))
            return entries(value)
        elif isinstance(value, tuple):
            return entries(value)
        elif isinstance(value, BuiltinMethodType | partial):
            return referred(value)
        elif self._is_own(value) or _is_sequence(value):
            self._beside += [type(value)] * is_users(type(value))
            self.takes.append(partial(take_object, value))
            return held(value)
        elif _is_tool(value):
            return _drawing(value)
        return ()

    def _is_own(self, value: Any) -> bool:
        if isinstance(value, (type, *OF_OTHERS)):
            return False
        kind = type(value)
        return package(kind) in self._packages or (is_users(kind) and not manages(value))

    def look_into(self, functions: list[Any]) -> None:
        """Keep what functions of the user's own refer to, besides those that were found so far, and what they run."""
        functions, looked = functions + self._beside, set[int]()
        while new := [one for one in (*functions, *self._methods()) if id(one) not in looked]:
            looked.update(map(id, new))
            walk(new, self._visit_referred, bounded=True)

    def _methods(self) -> Iterable[FunctionType]:
        return (one for kind in self._kinds for one in methods_of(kind, self._run))

    def _visit_referred(self, value: Any) -> Iterable[Any]:
        if id(value) in self._seen or isinstance(value, nn.Module):
            return ()
        self._seen.add(id(value))
        if isinstance(value, FunctionType):
            if is_users_function(value):
                self.takes.extend(takes_of_variables(value))
                self._run |= dict.fromkeys(names_in(value.__code__).attributes)
            return referred(value)
        if isinstance(value, type):
            return self._visit_kind(value) if is_users(value) and value not in self._kinds else ()
        if isinstance(value, Tensor | np.ndarray) and not self._has_room_for(value):
            return ()
        inside = self._visit(value) or referred(value)
        return inside if isinstance(value, OF_OTHERS) else [*inside, type(value)]

    def _visit_kind(self, kind: type) -> Iterable[Any]:
        self._kinds[kind] = None
        self.takes.append(partial(take_class, kind))
        return data_of(kind).values()

    def _has_room_for(self, value: Tensor | np.ndarray) -> bool:
        self._room -= value.numel() if isinstance(value, Tensor) else value.size
        return self._room >= 0


def _is_sequence(value: Any) -> bool:
    """Whether an object counts how many quasi-random numbers it has drawn, as torch's and SciPy's do."""
    return isinstance(inspect.getattr_static(value, "num_generated", None), int)


def _is_tool(value: Any) -> bool:
    """Whether an object of a library can be called, as a transform can."""
    return callable(value) and not (isinstance(value, (*_OF_CODE, *OF_OTHERS)) or is_users(type(value)))


def _drawing(tool: Any, nested: int = _NESTED) -> Iterator[Any]:
    """The random generators of a library's object that can be called, and of such objects in it."""
    for one in islice(held(tool), MOST):
        for value in islice(entries(one), MOST) if isinstance(one, CONTAINERS) else [one]:
            if take_of_generator(value) is not None:
                yield value
            elif nested and _is_tool(value):
                yield from _drawing(value, nested - 1)
