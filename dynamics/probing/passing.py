"""State that the user's own code changes in passing, wherever it keeps it: counters, generators, caches."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from functools import partial
from numbers import Number
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .bytecode import names_in
from .contents import (
    Saved,
    Saver,
    data_of,
    may_be_kept,
    may_be_trained,
    save_array,
    save_cell,
    save_named,
    save_plain_cell,
    save_plain_entries,
    save_tensor,
)
from .generators import drawing, draws, is_tool, savers_of_drawing
from .ownership import CONTAINERS, OF_OTHERS, entries, is_users, is_users_function, manages, own_attributes, size
from .references import content_of, methods_of, referred, variables_of
from .walk import MOST, walk

_PER_ENTRY = 1000  # numbers that cost as much as an entry of a container


class InPassing:
    """Finds the state that functions and methods change, by what their code names and sets.

    That is random generators, and sequences of quasi-random numbers, wherever they are; and what the code sets or
    changes in place, if it is plain (numbers, tensors, arrays, and containers of up to ``MOST`` of these): global and
    closure variables, and attributes of classes and objects of the user's own. What is made once, such as a layer, and
    what says that it was, such as a boolean or a container's first entries, stays: it cannot be made again. So does
    what the code only reads, because another thread may change it meanwhile.

    Args:
        kinds: the user's own classes whose methods run.
        seen: ids of objects that are kept already.
        room: how many numbers may be kept.
        afterwards: whether state is put back after an evaluation: then each variable is, whatever it holds. Before one,
            all that one function sets are put back, or none: they may belong together.
    """

    def __init__(self, kinds: Iterable[type], seen: set[Any], room: int, *, afterwards: bool) -> None:
        self._kinds, self._seen, self._room, self._afterwards = dict.fromkeys(kinds), seen, room, afterwards
        self._kept = frozenset(self._kinds)  # their attributes are kept already
        self._run = {"forward", "__call__"}  # names of the methods that run, as far as is known
        self._waiting: dict[type, dict[str, list[FunctionType]]] = {}  # methods that are not known to run
        self._methods: set[int] = set()  # ids of those that are known to run
        self._sets: set[str] = set()  # names of attributes that are set, of any object
        self._sets_own: defaultdict[type, set[str]] = defaultdict(set)  # of a class's own object, by its methods
        self._changes: set[str] = set()  # names of what is changed in place
        self._changes_inside: set[str] = set()  # names of containers of what is
        self._owners: list[Any] = []  # the user's own classes and objects
        self._savers: list[Saver] = []

    def savers(self, functions: Iterable[Any]) -> list[Saver]:
        """Savers of the state that functions change, and the methods that run."""
        new = [*functions, *self._further_methods()]
        while new:
            walk(new, self._visit, bounded=True)
            new = self._further_methods()
        for owner in self._owners:
            with suppress(Exception):  # an object may be anything, and change meanwhile
                self._save_attributes(owner)
        return self._savers

    def _further_methods(self) -> list[FunctionType]:
        """The methods that run, as far as is known now, and were not returned before."""
        found: list[FunctionType] = []
        for kind in self._kinds:
            if kind not in self._waiting:
                self._waiting[kind] = methods_of(kind)
            for name in sorted(self._waiting[kind].keys() & self._run):
                methods = self._waiting[kind].pop(name)
                self._sets_own[kind].update(*(names_in(method.__code__).sets_own for method in methods))
                self._methods.update(map(id, methods))
                found += methods
        return found

    def _visit(self, value: Any) -> Iterable[Any]:
        """Note what an object shows of the state, and return what is to be visited further."""
        if isinstance(value, FunctionType):
            return self._visit_function(value) if is_users_function(value) else ()
        if isinstance(value, type):
            return self._visit_owner(value) if is_users(value) else ()
        if isinstance(value, Number | str | ModuleType | nn.Module | Tensor | np.ndarray):
            return ()
        if isinstance(value, CONTAINERS):
            return entries(value) if size(value) <= MOST else ()
        if isinstance(value, partial | MethodType | BuiltinMethodType):
            return referred(value)
        if draws(value):
            self._savers += savers_of_drawing(value)
        elif is_users(type(value)) and not isinstance(value, OF_OTHERS):
            return self._visit_owner(value)
        elif is_tool(value):
            return drawing(value)
        return ()

    def _visit_function(self, function: FunctionType) -> Iterable[Any]:
        names = names_in(function.__code__)
        self._run |= names.attributes
        self._sets |= names.sets_attributes
        if id(function) not in self._methods:
            self._sets |= names.sets_own
        self._changes |= names.changes
        self._changes_inside |= names.changes_inside
        found: list[Any] = []
        for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=False):
            if content := content_of(cell):
                found += content
                if name in names.sets_cells:
                    self._savers.append(partial(save_cell if self._afterwards else save_plain_cell, cell))
                self._save_changed(name, content[0], names.changes, names.changes_inside)
        for number, (space, named) in enumerate(variables_of(function)):
            own = names.sets_variables if number == 0 else names.sets_attributes & set(named)
            if own:
                self._savers.append(partial(save_named, space, own, afterwards=self._afterwards))
            found += [space[name] for name in named]
            for name in named:
                self._save_changed(name, space[name], names.changes, names.changes_inside)
        return [*found, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]

    def _visit_owner(self, value: Any) -> Iterable[Any]:
        """Note a class or an object of the user's own."""
        kind = value if isinstance(value, type) else type(value)
        self._kinds[kind] = None
        if not (value is kind and kind in self._kept) and id(value) not in self._seen:
            self._owners.append(value)
        return [kind] if manages(value) else [kind, *_attributes(value).values()]

    def _save_attributes(self, owner: Any) -> None:
        """Save the attributes of a class or an object that are set, or changed in place."""
        kind = owner if isinstance(owner, type) else type(owner)
        own, sets = _attributes(owner), self._sets | self._sets_own[kind]
        if sets:
            self._savers.append(partial(save_named, owner if owner is kind else own, sets, afterwards=self._afterwards))
        for name, one in list(own.items()):
            self._save_changed(name, one, self._changes, self._changes_inside)

    def _save_changed(self, name: str, value: Any, changed: Set[str], inside: Set[str]) -> None:
        """Save what a value of this name holds, if it is ``changed``; or what its entries hold, if these are."""
        if name in inside and name not in changed and isinstance(value, CONTAINERS):
            walk(entries(value) if size(value) <= MOST else (), self._visit_content, bounded=True)
        elif name in changed or name in inside:  # of tensors and arrays, views may be changed
            walk([value], self._visit_content, bounded=True)

    def _visit_content(self, value: Any) -> Iterable[Any]:
        """Save what a container, tensor or array holds, unless it is kept or too large; returns what is inside it."""
        if id(value) in self._seen:
            return ()
        if isinstance(value, dict | list | deque | set):
            if self._has_room_for(_PER_ENTRY * size(value)):
                self._add(save_plain_entries, value)
                return entries(value)
        elif isinstance(value, np.ndarray) and value.flags.writeable and self._has_room_for(value.size):
            self._add(save_array, value)
        elif isinstance(value, Tensor) and _may_be_kept(value) and self._has_room_for(value.numel()):
            self._add(save_tensor, value)
        return ()

    def _add(self, save: Callable[[Any], Saved], value: Any) -> None:
        self._seen.add(id(value))
        self._savers.append(partial(_gently, partial(save, value)))

    def _has_room_for(self, count: int) -> bool:
        fits = count <= self._room
        self._room -= count if fits else 0
        return fits


def _gently(save: Saver) -> Saved:
    """Save what is put back only if it can be: a tensor may have another shape by then."""
    put_back, numbers = save()

    def as_far_as_possible() -> None:
        with suppress(Exception):
            put_back()

    return as_far_as_possible, numbers


def _may_be_kept(tensor: Tensor) -> bool:
    return may_be_kept(tensor) and not may_be_trained(tensor)


def _attributes(owner: Any) -> Any:
    return data_of(owner) if isinstance(owner, type) else own_attributes(owner)
