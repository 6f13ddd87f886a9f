"""Saves what Python objects hold besides parameters and buffers, and puts it back, in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..network.exchanged import noted_on
from .contents import (
    Saver,
    attributes_of,
    data_of,
    may_be_kept,
    may_be_trained,
    save_array,
    save_attributes,
    save_class,
    save_container,
    save_object,
    save_tensor,
    savers_of_variables,
    storage_of,
)
from .equality import are_equal
from .generators import drawing, is_sequence, is_tool, saver_of_generator
from .ownership import OF_OTHERS, OURS, entries, held, is_users, manages, package, passed_on
from .passing import InPassing
from .references import referred
from .walk import walk

_FEW = 2**20  # so many numbers are kept in any case
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})


class Kept:
    """The contents of objects as they are now; ``trained`` are tensors that an optimizer may train, and not kept."""

    def __init__(self, savers: list[Saver], trained: Iterable[Tensor] = ()) -> None:
        self._trained = [(one, one._version) for one in trained]
        self._savers, self._put_backs, self._numbers = savers, [], []
        for save in savers:
            with suppress(Exception):  # an object may be anything
                put_back, numbers = save()
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
        return Kept(self._savers)

    def are_as(self, other: Kept) -> bool:
        """Whether both hold the same numbers."""
        return len(self._numbers) == len(other._numbers) and all(map(are_equal, self._numbers, other._numbers))


def kept(
    modules: Iterable[nn.Module], function: Callable | None = None, *, bounded: bool = False, afterwards: bool = False
) -> Kept:
    """Keep the plain attributes of modules, of their classes and parameters, and what a function refers to.

    Attributes are put back as the same objects. The contents of tensors, arrays, lists, dictionaries, sets, deques and
    random generators, nested ones too, are put back in place: whoever shares such an object goes on sharing it. So are
    the contents of objects whose class comes from the same package as a module's, and of sequences of quasi-random
    numbers. Those of other classes of the user's own are, too, unless they hold networks, optimizers or data; these
    themselves are never kept. Of other objects that can be called, such as a library's transforms, only random
    generators are. Of the function, these are kept and its closure and global variables, if they are numbers, tensors,
    collections or the user's own objects; but not what is trained, nor many more numbers than the modules have
    parameters, as in a data set. What forward methods and the function change elsewhere in passing is kept as
    :class:`~dynamics.probing.passing.InPassing` says, to be put back before an evaluation or ``afterwards``. If
    ``bounded``, no more than some objects of the modules are kept, those that lie nearest to them.
    """
    keeper = _Keeper(list(modules), bounded)
    functions = [] if function is None else [passed_on(function)]
    keeper.look_into(functions)
    passing = InPassing(keeper.kinds, keeper.seen, keeper.room, afterwards=afterwards)
    return Kept(keeper.savers + passing.savers(functions + keeper.beside), keeper.trained)


class _Keeper:
    """Finds what is to be kept, each object once; objects that cannot be examined are left alone.

    Attributes:
        savers: savers of what was found.
        trained: tensors that an optimizer may train.
        kinds: the modules' own classes, if they are the user's.
        beside: functions and classes that were found.
        seen: ids of the objects found.
        room: how many numbers may still be kept.
    """

    def __init__(self, modules: list[nn.Module], bounded: bool) -> None:
        self.savers: list[Saver] = []
        self.trained: list[Tensor] = []
        self.seen: set[Any] = {storage_of(one) for module in modules for one in module._parameters.values()}
        self._packages = {package(type(module)) for module in modules} - {"torch", OURS}
        parameters = (one for module in modules for one in module._parameters.values() if one is not None)
        self.room = max(sum(one.numel() for one in parameters), _FEW)
        values: list[Any] = []
        for module in modules:
            self.savers.append(partial(save_attributes, module))
            values += attributes_of(module).values()
            for parameter in (one for one in module._parameters.values() if one is not None):
                values += noted_on(parameter).values()
        own = {type(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)}
        self.kinds = [kind for kind in own if is_users(kind)]
        self.beside: list[Any] = []
        for kind in self.kinds:
            self.savers.append(partial(save_class, kind))
            values += data_of(kind).values()
        walk(values, self._visit_once, bounded=bounded)

    def _visit_once(self, value: Any) -> Iterable[Any]:
        if isinstance(value, FunctionType | MethodType):
            self.beside.append(value)
            return ()
        if id(value) in self.seen:
            return ()
        self.seen.add(id(value))
        return self._visit(value)

    def _visit(self, value: Any) -> Iterable[Any]:
        """Keep an object, and return what is inside it."""
        if type(value) in _PLAIN:
            return ()
        if isinstance(value, Tensor):  # what shares a parameter's memory, as in spectral_norm, is not state
            if storage_of(value) not in self.seen and may_be_kept(value):
                self.trained.append(value) if may_be_trained(value) else self.savers.append(partial(save_tensor, value))
        elif (generator := saver_of_generator(value)) is not None:
            self.savers.append(generator)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self.savers.append(partial(save_array, value))
        elif isinstance(value, dict | list | deque | set):
            self.savers.append(partial(save_container, value))
            return entries(value)
        elif isinstance(value, tuple):
            return entries(value)
        elif isinstance(value, BuiltinMethodType | partial):
            return referred(value)
        elif self._is_own(value) or is_sequence(value):
            self.beside.append(type(value))
            self.savers.append(partial(save_object, value))
            return held(value)
        elif is_tool(value):
            return drawing(value)
        return ()

    def _is_own(self, value: Any) -> bool:
        if isinstance(value, (type, *OF_OTHERS)):
            return False
        kind = type(value)
        return package(kind) in self._packages or (is_users(kind) and not manages(value))

    def look_into(self, functions: list[Any]) -> None:
        """Keep what functions of the user's own refer to: closure and global variables, and objects in these."""
        walk(functions, self._visit_referred, bounded=True)

    def _visit_referred(self, value: Any) -> Iterable[Any]:
        if id(value) in self.seen or isinstance(value, nn.Module):
            return ()
        if isinstance(value, FunctionType):
            self.savers.extend(savers_of_variables(value))
        elif isinstance(value, Tensor | np.ndarray) and not self._has_room_for(value):
            return ()
        return self._visit(value) or referred(value, far=False)

    def _has_room_for(self, value: Tensor | np.ndarray) -> bool:
        self.room -= value.numel() if isinstance(value, Tensor) else value.size
        return self.room >= 0
