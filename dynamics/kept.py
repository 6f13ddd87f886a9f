"""What Python objects keep besides parameters and buffers, and how it is put back: in place, as what it was."""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from numbers import Number
from types import BuiltinMethodType, CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ownership import OF_OTHERS, OURS, content_of, held, is_users, is_users_module, manages, package, referred, slots

PutBack = Callable[[], None]
Taken = tuple[PutBack, list[Any]]  # what puts contents back, and the numbers among them
Take = Callable[[], Taken]

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"} | {"forward"}  # which frameworks replace for a while
_MISSING = object()
_MOST = 1000  # objects that are looked into
_DEPTH = 4
_FEW = 2**20  # numbers that are kept in any case


class Kept:
    """The contents of objects as they are now."""

    def __init__(self, takes: list[Take]) -> None:
        self._takes, self._put_backs, self._numbers = takes, [], []
        for take in takes:
            with suppress(Exception):  # it may be anything
                put_back, numbers = take()
                self._put_backs.append(put_back)
                self._numbers += numbers

    def put_back(self) -> None:
        """Give each object the contents it had. What cannot be put back stops no other, and is raised in the end."""
        with ExitStack() as all_of_them:
            for put_back in self._put_backs:
                all_of_them.callback(put_back)

    def now(self) -> Kept:
        """What the same objects have by now."""
        return Kept(self._takes)

    def are_as(self, other: Kept) -> bool:
        """Whether what is kept here and there holds the same numbers."""
        return len(self._numbers) == len(other._numbers) and all(map(_equal, self._numbers, other._numbers))


def kept(modules: Iterable[nn.Module], function: Callable | None = None) -> Kept:
    """Keep the plain attributes of modules and of their classes, and what a function refers to.

    Attributes are put back as the objects they were, and the contents of tensors, arrays, lists, dictionaries, sets,
    deques and random generators, nested ones too, in place: whoever shares such an object goes on sharing it. So are
    those of objects whose class comes from where a module's does, or is the user's own, but for networks, optimizers
    and data, and for objects from elsewhere that hold these. Of the modules' forward passes it is the generators of
    random numbers that they refer to, by themselves or by objects of the user's own. Of the function it is those, and
    its variables of surrounding functions and of its module, if they are numbers, tensors, collections or the user's
    own objects: not what is trained, nor many more numbers than the modules have parameters, such as a data set.
    """
    modules = list(modules)
    keeper = _Keeper(modules)
    own = (module for module in modules if not isinstance(module, torch.jit.ScriptModule))
    forwards = (getattr(type(module), "forward", None) for module in own)
    keeper.look_for_generators(list(dict.fromkeys(forwards)))
    if function is not None:
        keeper.look_into(function)
    return Kept(keeper.takes)


class _Keeper:
    """Finds what is to be kept, each object once; what cannot be looked at is left alone."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.takes: list[Take] = []
        self._seen: set[Any] = {_storage(one) for module in modules for one in module._parameters.values()}
        self._packages = {package(type(module)) for module in modules} - {"torch", OURS}
        parameters = (one for module in modules for one in module._parameters.values() if one is not None)
        self._room = max(sum(one.numel() for one in parameters), _FEW)
        waiting: deque[Any] = deque()
        for module in modules:
            self.takes.append(partial(_take_attributes, module))
            waiting.extend(_attributes(module).values())
        for kind in {type(module) for module in modules if is_users(type(module))}:
            self.takes.append(partial(_take_class, kind))
            waiting.extend(_data(kind).values())
        while waiting:
            value = waiting.popleft()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                try:
                    waiting.extend(self._visit(value))
                except Exception:  # it may be anything
                    continue

    def _visit(self, value: Any) -> Iterable[Any]:
        """Keep an object; what is in it."""
        if isinstance(value, Tensor):  # one that shares a parameter's memory, as with spectral_norm, is the optimizer's
            if _storage(value) not in self._seen and _may_be_kept(value):
                self.takes.append(partial(_take_tensor, value))
        elif (generator := _generator(value)) is not None:
            self.takes.append(generator)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                self.takes.append(partial(_take_array, value))
        elif isinstance(value, dict | list | deque | set):
            self.takes.append(partial(_take_container, value))
            return list(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, tuple):
            return value
        elif isinstance(value, BuiltinMethodType | partial):
            return referred(value)
        elif self._is_own(value):
            self.takes.append(partial(_take_object, value))
            return held(value)
        return ()

    def _is_own(self, value: Any) -> bool:
        if isinstance(value, (type, *OF_OTHERS)):
            return False
        kind = type(value)
        return package(kind) in self._packages or (is_users(kind) and not manages(value))

    def look_for_generators(self, functions: list[Any]) -> None:
        """Keep the generators of random numbers that functions of the user's own refer to."""
        waiting = deque((function, 0) for function in functions)
        known: set[int] = set()
        while waiting and len(known) < _MOST:
            value, depth = waiting.popleft()
            if id(value) in known:
                continue
            known.add(id(value))
            try:
                if (generator := _generator(value)) is not None:
                    if id(value) not in self._seen:
                        self._seen.add(id(value))
                        self.takes.append(generator)
                elif depth < _DEPTH:
                    waiting.extend((inner, depth + 1) for inner in referred(value))
            except Exception:  # it may be anything
                continue

    def look_into(self, function: Any) -> None:
        """Keep what a function of the user's own refers to, and its variables."""
        waiting: deque[tuple[Any, int]] = deque([(function, 0)])
        known: set[int] = set()
        while waiting and len(known) < _MOST:
            value, depth = waiting.popleft()
            if id(value) in known or id(value) in self._seen:
                continue
            known.add(id(value))
            try:
                if isinstance(value, FunctionType):
                    self.takes.extend(_variables(value))
                    inner = referred(value)
                elif isinstance(value, Tensor | np.ndarray):
                    inner = self._visit(value) if self._has_room_for(value) else ()
                elif isinstance(value, nn.Module):
                    inner = ()
                else:
                    inner = self._visit(value) or referred(value)
                waiting.extend((one, depth + 1) for one in inner if depth < _DEPTH)
            except Exception:  # it may be anything
                continue

    def _has_room_for(self, value: Tensor | np.ndarray) -> bool:
        self._room -= value.numel() if isinstance(value, Tensor) else value.size
        return self._room >= 0


def _variables(function: FunctionType) -> list[Take]:
    """What keeps which objects a function's variables of elsewhere are, as far as these are numbers or arrays."""
    if not is_users_module(function.__globals__.get("__name__")):
        return []
    of_module = {
        name: value for name in function.__code__.co_names if _is_number(value := function.__globals__.get(name))
    }
    cells = [cell for cell in function.__closure__ or () if any(map(_is_number, content_of(cell)))]
    return [partial(_take_names, function.__globals__, of_module), *(partial(_take_cell, cell) for cell in cells)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Number | Tensor | np.ndarray)


def _take_names(module: dict[str, Any], names: Iterable[str]) -> Taken:
    own = {name: module[name] for name in names if name in module}
    return partial(module.update, own), _numbers(own.values())


def _take_cell(cell: CellType) -> Taken:
    content = cell.cell_contents
    return partial(setattr, cell, "cell_contents", content), _numbers([content])


def _take_attributes(module: nn.Module) -> Taken:
    own = _attributes(module)

    def put_back() -> None:
        now = vars(module)
        for name in now.keys() - own.keys() - _REGISTRIES:
            del now[name]
        now.update(own)

    return put_back, _numbers(own.values())


def _take_class(kind: type) -> Taken:
    own = _data(kind)

    def put_back() -> None:
        now = _data(kind)
        for name in now.keys() - own.keys():
            delattr(kind, name)
        for name, value in own.items():
            if now.get(name, _MISSING) is not value:
                setattr(kind, name, value)

    return put_back, _numbers(own.values())


def _take_tensor(tensor: Tensor) -> Taken:
    with torch.no_grad():
        content, version = tensor.detach().clone(), tensor._version

    @torch.no_grad()
    def put_back() -> None:
        # Torch's BatchNorm changes its statistics without a new version.
        if tensor._version != version or not _equal(tensor, content):
            tensor.detach().copy_(content)

    return put_back, [content]


def _take_array(array: np.ndarray) -> Taken:
    content = array.copy()
    return lambda: np.copyto(array, content), [content]


def _take_container(value: Any) -> Taken:
    """A dictionary, list, deque or set, by their own methods, whatever a class makes of these."""
    kind = next(one for one in (OrderedDict, dict, list, deque, set) if isinstance(value, one))
    has_keys = issubclass(kind, dict)
    fill = {list: list.extend, deque: deque.extend}.get(kind) or kind.update

    def entries() -> list[Any]:
        return list(kind.items(value) if has_keys else kind.__iter__(value))

    def objects(entries: list[Any]) -> list[Any]:
        return list(chain.from_iterable(entries)) if has_keys else entries

    content = entries()

    def put_back() -> None:
        if not _are_same(objects(entries()), objects(content)):  # another thread may be reading it
            kind.clear(value)
            fill(value, content)

    return put_back, _numbers(objects(content))


def _take_object(value: Any) -> Taken:
    own, members = dict(vars(value)) if hasattr(value, "__dict__") else {}, slots(value)

    def put_back() -> None:
        now = vars(value) if hasattr(value, "__dict__") else {}
        for name in now.keys() - own.keys():
            del now[name]
        now.update({name: one for name, one in own.items() if now.get(name, _MISSING) is not one})
        for member, one in members:
            if member.__get__(value) is not one:
                member.__set__(value, one)

    return put_back, _numbers([*own.values(), *(one for _, one in members)])


def _take_generator(get: Callable[[], Any], put: Callable[[Any], None]) -> Taken:
    state = get()
    return partial(put, state), [state]


def _generator(value: Any) -> Take | None:
    """What keeps a generator of random numbers; None of anything else."""
    if isinstance(value, torch.Generator):
        return partial(_take_generator, value.get_state, value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(_take_generator, partial(getattr, bits, "state"), partial(setattr, bits, "state"))
    if isinstance(value, np.random.RandomState):
        return partial(_take_generator, value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(_take_generator, value.getstate, value.setstate)
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _REGISTRIES}


def _data(kind: type) -> dict[str, Any]:
    """The attributes of a class that are neither functions, properties and their like, nor Python's own."""
    return {
        name: one for name, one in vars(kind).items() if not (name.startswith("__") or hasattr(type(one), "__get__"))
    }


def _may_be_kept(tensor: Tensor) -> bool:
    trained = tensor.requires_grad and tensor.is_leaf
    return not trained and tensor.layout is torch.strided and not tensor.is_inference()


def _numbers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, Number)]


def _are_same(values: list[Any], others: list[Any]) -> bool:
    """Whether two lists are of the very same objects."""
    return len(values) == len(others) and all(map(operator.is_, values, others))


def _equal(one: Any, other: Any) -> bool:
    """Whether two numbers, arrays, or states of generators are the same; what is not a number is as any other."""
    try:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
            return same and (torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            return one.dtype == other.dtype and one.tobytes() == other.tobytes()
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
        if isinstance(one, tuple) and isinstance(other, tuple):
            return len(one) == len(other) and all(map(_equal, one, other))
        return type(one) is type(other) and bool(one == other or (one != one and other != other))
    except Exception:  # of a type of its own
        return False


def _storage(tensor: Tensor | None) -> tuple[str, int]:
    """Which memory a tensor lies in, as far as it can be told."""
    try:
        return "storage", tensor.untyped_storage().data_ptr() or id(tensor)
    except (AttributeError, NotImplementedError, RuntimeError):  # none, sparse, or one that only stands for others
        return "storage", id(tensor)
