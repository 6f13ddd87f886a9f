"""Iterators stay as they are while an objective is evaluated: what it drew from them the loop would miss."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from torch import nn

from .contents import PutBack, attributes_of
from .ownership import OF_OTHERS, OURS, content_of, is_users, is_users_module, package, referred
from .walk import walk


class UndrawnIterator:
    """Stands in for an iterator in this thread, and refuses to be drawn from; other threads draw from it as ever."""

    def __init__(self, iterator: Iterator) -> None:
        self._iterator, self._thread = iterator, threading.get_ident()

    def __iter__(self) -> UndrawnIterator:
        return self

    def __next__(self) -> Any:
        if threading.get_ident() != self._thread:
            return next(self._iterator)
        raise RuntimeError(
            f"it draws from an iterator, a {type(self._iterator).__name__}, and what the recorder drew the loop would "
            "miss: draw in the loop, and pass what was drawn to observe() as a part of the batch"
        )

    def __deepcopy__(self, memo: dict) -> UndrawnIterator:
        return self


def draws(value: Any) -> bool:
    """Whether an object is an iterator whose position cannot be put back; one of the user's own class is no such."""
    kind = type(value)
    return hasattr(kind, "__next__") and not (isinstance(value, io.IOBase) or is_users(kind) or package(kind) == OURS)


@contextmanager
def undrawn(modules: Iterable[nn.Module], function: Callable | None) -> Iterator[None]:
    """Inside, the iterators that modules hold and that a function of the user's own refers to cannot be drawn from.

    They are found in variables, defaults of arguments, attributes of the user's own objects, lists and dictionaries.
    """
    put_back: list[PutBack] = []

    def visit(value: Any) -> Iterable[Any]:
        for place, one in _places(value):
            if draws(one):
                place(UndrawnIterator(one))
                put_back.append(partial(place, one))
        return _inside(value)

    try:
        for module in modules:
            visit(module)
        if function is not None:
            walk([function], visit, bounded=True)
        yield
    finally:
        for one in put_back:
            one()


def _places(value: Any) -> list[tuple[Callable[[Any], None], Any]]:
    """The places of an object that may hold an iterator: functions that put another object there, and what is there."""
    if isinstance(value, FunctionType):
        if not is_users_module(value.__globals__.get("__name__")):
            return []
        cells = [(partial(setattr, cell, "cell_contents"), *content_of(cell)) for cell in value.__closure__ or ()]
        names = [name for name in value.__code__.co_names if name in value.__globals__]
        found = [cell for cell in cells if len(cell) == 2] + _entries(value.__globals__, names)
        return found + _defaults(value) + _entries(value.__kwdefaults__ or {}, value.__kwdefaults__ or ())
    if isinstance(value, partial):
        return _entries(value.keywords, value.keywords)
    if isinstance(value, nn.Module):
        return _entries(vars(value), attributes_of(value))
    if type(value) in (dict, list):
        return _entries(value, list(value) if isinstance(value, dict) else range(len(value)))
    own = is_users(type(value)) and not isinstance(value, (type, *OF_OTHERS)) and hasattr(value, "__dict__")
    return _entries(vars(value), list(vars(value))) if own else []


def _entries(holder: Any, keys: Iterable[Any]) -> list[tuple[Callable[[Any], None], Any]]:
    return [(partial(holder.__setitem__, key), holder[key]) for key in keys]


def _defaults(function: FunctionType) -> list[tuple[Callable[[Any], None], Any]]:
    def put(place: int, one: Any) -> None:
        own = function.__defaults__
        function.__defaults__ = (*own[:place], one, *own[place + 1 :])

    return [(partial(put, place), one) for place, one in enumerate(function.__defaults__ or ())]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict | list | tuple):
        return value.values() if isinstance(value, dict) else value
    known = isinstance(value, partial | MethodType | BuiltinMethodType | FunctionType)
    return referred(value) if known or not isinstance(value, nn.Module) else ()
