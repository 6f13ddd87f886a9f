"""Iterators stay as they are while an objective is evaluated: what it drew from them the loop would miss."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .contents import attributes_of
from .ownership import OF_OTHERS, OURS, is_users, is_users_function, package, passed_on
from .references import content_of, referred, variables_of
from .walk import MOST, walk


class UndrawnIterator:
    """Stands in for an iterator, and refuses to be drawn from in this thread; other threads draw from it as ever.

    Attributes:
        refuses: whether it still does so; one that the objective has put elsewhere is the iterator again afterwards.
    """

    def __init__(self, iterator: Iterator) -> None:
        self._iterator, self._thread, self.refuses = iterator, threading.get_ident(), True

    def __iter__(self) -> UndrawnIterator:
        return self

    def __next__(self) -> Any:
        self._check()
        return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":  # copy and pickle look for attributes before there are any
            raise AttributeError(name)
        value = getattr(self._iterator, name)
        return self._checked(value) if name in ("send", "throw", "close") else value

    def __deepcopy__(self, memo: dict) -> UndrawnIterator:
        return self

    def _checked(self, function: Callable) -> Callable:
        def checked(*args: Any) -> Any:
            self._check()
            return function(*args)

        return checked

    def _check(self) -> None:
        if self.refuses and threading.get_ident() == self._thread:
            raise RuntimeError(
                f"it draws from an iterator, a {type(self._iterator).__name__}, and what the recorder drew the loop "
                "would miss: draw in the loop, and pass what was drawn to observe() as a part of the batch"
            )


def is_iterator(value: Any) -> bool:
    """Whether an object is an iterator whose position cannot be put back; one of the user's own class is no such."""
    kind = type(value)
    if kind is UndrawnIterator:
        return not value.refuses
    return hasattr(kind, "__next__") and not (isinstance(value, io.IOBase) or is_users(kind) or package(kind) == OURS)


@contextmanager
def undrawn(modules: Iterable[nn.Module], function: Callable | None) -> Iterator[None]:
    """Inside, the iterators that modules hold and that a function of the user's own refers to cannot be drawn from.

    They are found in variables, defaults of arguments, attributes of the user's own objects, lists and dictionaries.
    Afterwards each is where it was, unless something else was put there meanwhile.
    """
    replaced: list[tuple[_Place, UndrawnIterator, Iterator]] = []

    def visit(value: Any) -> Iterable[Any]:
        for place in _places(value):
            iterator = place.read()
            replaced.append((place, UndrawnIterator(iterator), iterator))
            place.write(replaced[-1][1])
        return _inside(value)

    try:
        for module in modules:
            visit(module)
        if function is not None:
            walk([passed_on(function)], visit, bounded=True)
        yield
    finally:
        for place, stand_in, iterator in replaced:
            stand_in.refuses = False
            with suppress(Exception):  # the place may be gone
                if place.read() is stand_in:
                    place.write(iterator)


class _Place(NamedTuple):
    """Where an iterator is: what is there now, and a function that puts another object there."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def _places(value: Any) -> list[_Place]:
    """The places of an object that hold an iterator."""
    if isinstance(value, FunctionType):
        if not is_users_function(value):
            return []
        cells = [
            _Place(partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents"))
            for cell in value.__closure__ or ()
            if any(map(is_iterator, content_of(cell)))
        ]
        named = [_entries(space, [(name, space[name]) for name in names]) for space, names in variables_of(value)]
        found = [*cells, *chain.from_iterable(named), *_defaults(value)]
        return found + _entries(value.__kwdefaults__, (value.__kwdefaults__ or {}).items())
    if isinstance(value, partial):
        return _entries(value.keywords, value.keywords.items())
    if isinstance(value, nn.Module):
        return _entries(vars(value), attributes_of(value).items())
    if type(value) in (dict, list):
        return _entries(value, islice(value.items() if isinstance(value, dict) else enumerate(value), MOST))
    of_users = is_users(type(value)) and not isinstance(value, (type, *OF_OTHERS)) and hasattr(value, "__dict__")
    return _entries(vars(value), vars(value).items()) if of_users else []


def _entries(holder: Any, entries: Iterable[tuple[Any, Any]]) -> list[_Place]:
    drawing = [key for key, one in entries if is_iterator(one)]
    return [_Place(partial(holder.__getitem__, key), partial(holder.__setitem__, key)) for key in drawing]


def _defaults(function: FunctionType) -> list[_Place]:
    def read(place: int) -> Any:
        return function.__defaults__[place]

    def write(place: int, one: Any) -> None:
        own = function.__defaults__
        function.__defaults__ = (*own[:place], one, *own[place + 1 :])

    drawing = [place for place, one in enumerate(function.__defaults__ or ()) if is_iterator(one)]
    return [_Place(partial(read, place), partial(write, place)) for place in drawing]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict | list | tuple):
        return value.values() if isinstance(value, dict) else value
    return referred(value)
