"""What functions and objects of the user's own refer to, and what their code names: variables and methods."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from numbers import Number
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .ownership import CONTAINERS, OF_OTHERS, entries, held, is_users, is_users_function, is_users_module, passed_on
from .walk import walk

_WITHOUT_MODULES = (Number, str, bytes, Tensor, np.ndarray, type, ModuleType)
_NAMED_BY: dict[str, tuple[str, ...]] = {
    "LOAD_GLOBAL": ("variables",),
    "LOAD_NAME": ("variables",),
    "STORE_GLOBAL": ("variables", "sets_variables"),
    "LOAD_ATTR": ("attributes",),
    "LOAD_METHOD": ("attributes",),
    "LOAD_SUPER_ATTR": ("attributes",),
    "STORE_ATTR": ("attributes",),
    "STORE_DEREF": ("sets_cells",),
}
_OF_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_OF_OBJECTS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR")
_OF_ENTRIES = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE", "COPY")  # "COPY" begins x[i] += 1
_OF_CONTAINERS = frozenset(
    ("add", "append", "appendleft", "clear", "discard", "extend", "insert", "move_to_end", "pop", "popitem", "popleft")
) | {"remove", "rotate", "setdefault", "sort", "update"}
_ENDS = ("STORE_FAST", "POP_TOP", "RETURN_VALUE")  # of a statement
_NEAR = 3  # instructions between an object and what changes it


class Names(NamedTuple):
    """What a function's code names: global variables, and attributes of any object; and which of these it sets.

    ``sets_own`` are attributes of its first argument, which is a method's object, ``sets_attributes`` those of others,
    ``sets_cells`` variables of the functions around it. ``changes`` are the names of what it may change in place: by
    setting entries, or by a method of containers or one of tensors whose name ends in an underscore.
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    sets_variables: frozenset[str]
    sets_own: frozenset[str]
    sets_attributes: frozenset[str]
    sets_cells: frozenset[str]
    changes: frozenset[str]


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """The names in a function's code, and in that of the functions and comprehensions inside it."""
    names: dict[str, set[str]] = {name: set() for name in Names._fields}
    latest: list[dis.Instruction] = []
    copied = None  # the object of x.i += 1
    for one in dis.get_instructions(code):
        if one.opname == "COPY" and latest:
            copied = latest[-1]
        if one.opname == "STORE_ATTR" and latest:
            owner = copied if latest[-1].opname == "SWAP" else latest[-1]
            own = owner is not None and owner.opname == "LOAD_FAST" and owner.argval in code.co_varnames[:1]
            names["sets_own" if own else "sets_attributes"].add(one.argval)
        for name in _NAMED_BY.get(one.opname, ()):
            names[name].add(one.argval)
        if one.opname in _OF_ENTRIES or (one.opname in _OF_ATTRIBUTES and _changes(one.argval)):
            names["changes"].update(before.argval for before in latest if before.opname in _OF_OBJECTS)
        latest = [] if one.opname in _ENDS else [*latest, one][-_NEAR:]
    for inner in (names_in(one) for one in code.co_consts if isinstance(one, CodeType)):
        for name in names:
            names[name] |= getattr(inner, name)
    names["changes"] |= names["sets_variables"] | names["sets_own"] | names["sets_attributes"] | names["sets_cells"]
    return Names(**{name: frozenset(found) for name, found in names.items()})


def _changes(method: str) -> bool:
    return method in _OF_CONTAINERS or method[-1:] == "_" != method[-2:-1]


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


def methods_of(kind: type, names: Iterable[str]) -> Iterator[FunctionType]:
    """The methods and properties of these names that the user has defined, in a class or in those it inherits from."""
    own = [vars(one) for one in kind.__mro__ if is_users(one)]
    for name in names if own else ():
        for found in (attributes[name] for attributes in own if name in attributes):
            function = getattr(found, "fget", None) or getattr(found, "__func__", found)
            if isinstance(function, FunctionType):
                yield inspect.unwrap(function)


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
