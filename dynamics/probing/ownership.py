"""Who owns an object: the user, a library, or this package; and what it holds."""

from __future__ import annotations

import functools
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, MemberDescriptorType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

OF_OTHERS = (  # what has a life of its own, and so is no part of the state of whoever refers to it
    *(nn.Module, Dataset, DataLoader, Sampler, threading.Thread),
    *(torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler),
)
OURS = __name__.partition(".")[0]
CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, deque)


def package(kind: type) -> str:
    """The package that a class comes from."""
    return str(kind.__module__).partition(".")[0]


def is_users(kind: type) -> bool:
    """Whether a class is the user's own."""
    return is_users_module(kind.__module__)


def is_users_function(function: FunctionType) -> bool:
    """Whether a function is the user's own."""
    return is_users_module(function.__globals__.get("__name__"))


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


def own_attributes(value: Any) -> Mapping[str, Any]:
    """An object's attributes, without those of its class; none of its own code runs."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except Exception:  # no __dict__, or a property of that name
        return {}
    return own if isinstance(own, Mapping) else {}


def held(value: Any) -> list[Any]:
    """The values of an object's attributes and slots; none of its own code runs."""
    return [*own_attributes(value).values(), *(one for _, one in slots(value))]


def slots(value: Any) -> list[tuple[MemberDescriptorType, Any]]:
    """The slots of an object that have a value, each with that value."""
    kind: Any = type(value)
    found = []
    for member in _members(kind):
        try:
            found.append((member, member.__get__(value)))
        except AttributeError:
            continue
    return found


@functools.lru_cache(maxsize=4096)
def _members(kind: type) -> list[MemberDescriptorType]:
    members = (one for base in kind.__mro__ for one in vars(base).values())
    return [one for one in members if isinstance(one, MemberDescriptorType)]


def manages(value: Any) -> bool:
    """Whether an object holds networks, optimizers or data, as a trainer does; that is no part of the model's state."""
    return any(isinstance(one, OF_OTHERS) for one in held(value))


def entries(container: Any) -> list[Any]:
    """What a dictionary, list, tuple, set or deque holds, by built-in methods even if a subclass overrides them."""
    if isinstance(container, dict):
        return list(dict.values(container))
    return list(_kind(container).__iter__(container))


def size(container: Any) -> int:
    """How many entries it has, likewise."""
    return _kind(container).__len__(container)


def _kind(container: Any) -> Any:
    return next(kind for kind in CONTAINERS if isinstance(container, kind))


def passed_on(function: Any) -> Any:
    """The user's objective that a function is or, if it is a method of a framework's callback, that this passes on."""
    owner = getattr(function, "__self__", None)
    return getattr(owner, "_objective", function) if package(type(owner)) == OURS else function
