"""Who owns an object: the user, a library, or this package; and what it holds and refers to."""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from numbers import Number
from pathlib import Path
from types import BuiltinMethodType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from .walk import walk

OF_OTHERS = (
    *(nn.Module, Dataset, DataLoader, Sampler, threading.Thread),
    *(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
)
OURS = __name__.partition(".")[0]
_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, deque)
_WITHOUT_MODULES = (Number, str, bytes, Tensor, np.ndarray, type, ModuleType)


def package(kind: type) -> str:
    """The package that a class comes from."""
    return str(kind.__module__).partition(".")[0]


def is_users(kind: type) -> bool:
    """Whether a class is the user's own."""
    return is_users_module(kind.__module__)


@functools.cache
def is_users_module(module: str | None) -> bool:
    """Whether a Python module, by name, is the user's own: not of Python, not installed, and not of this package."""
    name = str(module or "")
    if name == "__main__":
        return True
    try:
        file = sys.modules[name].__file__
    except Exception:  # sys.modules may hold any object
        file = None
    if file is None or name.partition(".")[0] == OURS:
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return not installed and not file.startswith(sysconfig.get_path("stdlib"))


def held(value: Any) -> list[Any]:
    """The values of an object's attributes and slots; none of its own code runs."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except Exception:  # no __dict__, or a property of that name
        own = {}
    attributes = own.values() if isinstance(own, Mapping) else ()
    return [*attributes, *(one for _, one in slots(value))]


def slots(value: Any) -> list[tuple[MemberDescriptorType, Any]]:
    """The slots of an object that have a value, each with that value."""
    members = (one for kind in type(value).__mro__ for one in vars(kind).values())
    found = []
    for member in members:
        if isinstance(member, MemberDescriptorType):
            try:
                found.append((member, member.__get__(value)))
            except AttributeError:
                continue
    return found


def manages(value: Any) -> bool:
    """Whether an object holds networks, optimizers or data, as a trainer does; that is no part of the model's state."""
    return any(isinstance(one, OF_OTHERS) for one in held(value))


def referred(value: Any) -> Iterable[Any]:
    """The objects that a function, or an object of the user's own, refers to."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        if not is_users_module(value.__globals__.get("__name__")):
            return []
        contents = chain.from_iterable(map(content_of, value.__closure__ or ()))
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
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
        elif isinstance(value, _CONTAINERS):
            return entries(value)
        elif isinstance(value, _WITHOUT_MODULES):  # of which there may be many
            return ()
        elif isinstance(value, FunctionType | BuiltinMethodType | MethodType | partial):
            return referred(value)
        return held(value)

    walk([passed_on(function)], look, bounded=True)
    return list(found)


def entries(container: Any) -> list[Any]:
    """What a dictionary, list, tuple, set or deque holds, by built-in methods even if a subclass overrides them."""
    if isinstance(container, dict):
        return list(dict.values(container))
    return list(next(kind for kind in _CONTAINERS if isinstance(container, kind)).__iter__(container))


def passed_on(function: Any) -> Any:
    """The user's objective that a function is or, if it is a method of a framework's callback, that this passes on."""
    owner = getattr(function, "__self__", None)
    return getattr(owner, "_objective", function) if package(type(owner)) == OURS else function


def content_of(cell: CellType) -> tuple[Any, ...]:
    """The value of a closure variable, as a tuple; empty if it has none yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
