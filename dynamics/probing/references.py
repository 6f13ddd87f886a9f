"""What functions and objects of the user's own refer to: variables and methods that their code names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from numbers import Number
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bytecode import names_in
from .ownership import CONTAINERS, OF_OTHERS, entries, held, is_users, is_users_function, is_users_module, passed_on
from .walk import walk

_WITHOUT_MODULES = (Number, str, bytes, Tensor, np.ndarray, type, ModuleType)


def variables_of(function: FunctionType) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The variables that a function names: of its own module, and of modules of the user's own that it goes through.

    Each with the names that exist there.
    """
    names = names_in(function.__code__)
    waiting, known = [(function.__globals__, names.variables)], set()
    while waiting:
        space, named = waiting.pop()
        if id(space) not in known:
            known.add(id(space))
            found = sorted(name for name in named if name in space)
            yield space, found
            modules = (space[name] for name in found)
            waiting += [(vars(one), names.attributes) for one in modules if _is_users_own(one)]


def methods_of(kind: type) -> dict[str, list[FunctionType]]:
    """By name, the methods and properties that the user has defined in a class or in those it inherits from."""
    found: dict[str, list[FunctionType]] = {}
    for own in (vars(one) for one in kind.__mro__ if is_users(one)):
        for name, one in own.items():
            function = one.fget if issubclass(type(one), property) else one
            function = function.__func__ if issubclass(type(one), staticmethod | classmethod) else function
            if isinstance(function, FunctionType):
                found.setdefault(name, []).append(inspect.unwrap(function))
    return found


def referred(value: Any, *, far: bool = True) -> Iterable[Any]:
    """The objects that a function, or an object of the user's own, refers to.

    ``far``: also variables of other modules of the user's own that a function goes through.
    """
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        if not is_users_function(value):
            return []
        contents = chain.from_iterable(map(content_of, value.__closure__ or ()))
        spaces = islice(variables_of(value), None if far else 1)
        named = [space[name] for space, names in spaces for name in names]
        return [*contents, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]
    if is_users(type(value)) and not isinstance(value, (type, *OF_OTHERS)):
        return held(value)
    return []


def modules_of(function: Any) -> list[nn.Module]:
    """The networks and losses, with all their parts, that a function of the user's own refers to.

    They may be in objects of any library, such as the one that infers with a model and a guide in Pyro. None of the
    objects' own code runs.
    """
    found: dict[nn.Module, None] = {}

    def look(value: Any) -> Iterable[Any]:
        if isinstance(value, nn.Module):
            found.update({one: None for one in value.modules() if not isinstance(one, torch.jit.ScriptModule)})
        elif isinstance(value, CONTAINERS):
            return entries(value)
        elif isinstance(value, _WITHOUT_MODULES):  # of which there may be many
            return ()
        elif isinstance(value, FunctionType | BuiltinMethodType | MethodType | partial):
            return referred(value)
        return held(value)

    walk([passed_on(function)], look, bounded=True)
    return list(found)


def content_of(cell: CellType) -> tuple[Any, ...]:
    """The value of a closure variable, as a tuple; empty if it has none yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _is_users_own(value: Any) -> bool:
    return isinstance(value, ModuleType) and is_users_module(value.__name__)
