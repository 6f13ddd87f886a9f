"""How the contents of an object are saved, and later put back in place, for each kind of object."""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain
from numbers import Number
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .equality import are_equal
from .ownership import CONTAINERS, entries, is_users_function, slots
from .references import content_of, variables_of

PutBack = Callable[[], object]
Saved = tuple[PutBack, list[Any]]  # a function that puts the contents back, and the numbers among them
Saver = Callable[[], Saved]  # saves the present contents of one object

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"} | {"forward"}  # "forward": frameworks replace it for a while
_MISSING = object()


def savers_of_variables(function: FunctionType) -> list[Saver]:
    """Savers of a function's global and closure variables that are numbers, tensors or arrays; none if not the user's.

    They save which object each variable holds, not the object's contents.
    """
    if not is_users_function(function):
        return []
    space, names = next(variables_of(function))
    numbers = [name for name in names if _is_numeric(space[name])]
    cells = [cell for cell in function.__closure__ or () if any(map(_is_numeric, content_of(cell)))]
    return [partial(_save_names, space, numbers), *(partial(save_cell, cell) for cell in cells)]


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Number | Tensor | np.ndarray)


def _save_names(module: dict[str, Any], names: Iterable[str]) -> Saved:
    own = {name: module[name] for name in names if name in module}
    return partial(module.update, own), _numbers(own.values())


def save_named(owner: dict[str, Any] | type, names: Iterable[str], *, afterwards: bool) -> Saved:
    """Save which objects attributes of a class, or variables in a dictionary, hold.

    Before an evaluation they are put back if all are plain or None, both times; ``afterwards``, one by one. But where
    there was nothing, or None or a boolean, what is not plain stays: it was made once.
    """

    def present() -> dict[str, Any]:
        now = data_of(owner) if isinstance(owner, type) else owner
        return {name: now[name] for name in names if name in now}

    own = present()

    def put_back() -> None:
        now = present()
        if not afterwards and not all(one is None or is_plain(one) for one in (*own.values(), *now.values())):
            return
        for name in () if afterwards else now.keys() - own.keys():
            _delete(owner, name)
        for name, one in own.items():
            made_once = (one is None or isinstance(one, bool)) and not is_plain(now.get(name))
            if not made_once:
                _set(owner, name, one, now)

    return put_back, _numbers(own.values())


def is_plain(value: Any) -> bool:
    """Whether an object is a number, tensor or array; a boolean is none: it may say what was done once for all."""
    return _is_numeric(value) and not isinstance(value, bool)


def save_plain_cell(cell: CellType) -> Saved:
    """Save which object a closure variable holds; it is put back if it is plain, both times."""
    put_back, numbers = save_cell(cell)
    content = cell.cell_contents
    return lambda: put_back() if is_plain(content) and all(map(is_plain, content_of(cell))) else None, numbers


def save_plain_entries(value: Any) -> Saved:
    """Save the entries of a container; they are put back if all are plain or containers, both times.

    One that was empty and holds numbers now may say what was done once for all.
    """
    put_back, numbers = save_container(value)
    before = entries(value)

    def put_plain_back() -> None:
        now = entries(value)
        are_plain = all(is_plain(one) or isinstance(one, CONTAINERS) for one in (*before, *now))
        if are_plain and (before or not any(isinstance(one, Number) for one in now)):
            put_back()

    return put_plain_back, numbers


def save_cell(cell: CellType) -> Saved:
    """Save which object a closure variable holds."""
    content = cell.cell_contents
    return partial(setattr, cell, "cell_contents", content), _numbers([content])


def save_attributes(module: nn.Module) -> Saved:
    """Save a module's attributes except its registries of parameters, buffers, submodules and hooks."""
    own = attributes_of(module)
    return lambda: _restore(vars(module), own, attributes_of(module)), _numbers(own.values())


def save_class(kind: type) -> Saved:
    """Save the data attributes of a class."""
    own = data_of(kind)
    return lambda: _restore(kind, own, data_of(kind)), _numbers(own.values())


def _restore(owner: dict[str, Any] | type, own: dict[str, Any], now: dict[str, Any]) -> None:
    """Give a class, or the dictionary of an object, its own attributes back in place of those that it has now."""
    for name in now.keys() - own.keys():
        _delete(owner, name)
    for name, one in own.items():
        _set(owner, name, one, now)


def _delete(owner: dict[str, Any] | type, name: str) -> None:
    delattr(owner, name) if isinstance(owner, type) else owner.pop(name)


def _set(owner: dict[str, Any] | type, name: str, one: Any, now: dict[str, Any]) -> None:
    if now.get(name, _MISSING) is not one:
        setattr(owner, name, one) if isinstance(owner, type) else owner.update({name: one})


def save_tensor(tensor: Tensor) -> Saved:
    """Save the values of a tensor."""
    with torch.no_grad():
        content = tensor.detach().clone()
    return partial(_put_tensor_back, tensor, content, tensor._version), [content]


@torch.no_grad()
def _put_tensor_back(tensor: Tensor, content: Tensor, version: int) -> None:
    # Torch's BatchNorm changes its running statistics without raising their version.
    if tensor._version != version or not are_equal(tensor, content):
        tensor.detach().copy_(content)


def save_array(array: np.ndarray) -> Saved:
    """Save the values of an array."""
    content = array.copy()
    return lambda: np.copyto(array, content), [content]


def save_container(value: Any) -> Saved:
    """Save the entries of a dictionary, list, deque or set, by built-in methods even if a subclass overrides them."""
    kind: Any = next(one for one in (OrderedDict, dict, list, deque, set) if isinstance(value, one))
    has_keys = issubclass(kind, dict)
    fill: Any = {list: list.extend, deque: deque.extend}.get(kind) or kind.update

    def present() -> list[Any]:
        return list(kind.items(value) if has_keys else kind.__iter__(value))

    def objects(items: list[Any]) -> list[Any]:
        return list(chain.from_iterable(items)) if has_keys else items

    content = present()

    def put_back() -> None:
        if not _are_same(objects(present()), objects(content)):  # if unchanged, left alone: another thread may read it
            kind.clear(value)
            fill(value, content)

    return put_back, _numbers(objects(content))


def save_object(value: Any) -> Saved:
    """Save an object's attributes and slots."""
    own, members = dict(vars(value)) if hasattr(value, "__dict__") else {}, slots(value)

    def put_back() -> None:
        now = vars(value) if hasattr(value, "__dict__") else {}
        _restore(now, own, now)
        for member, one in members:
            if member.__get__(value) is not one:
                member.__set__(value, one)

    return put_back, _numbers([*own.values(), *(one for _, one in members)])


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {name: value for name, value in vars(module).items() if name not in _REGISTRIES}


def data_of(kind: type) -> dict[str, Any]:
    """The attributes of a class except descriptors, such as functions and properties, and Python's own (``__x__``)."""
    return {
        name: one for name, one in vars(kind).items() if not (name.startswith("__") or hasattr(type(one), "__get__"))
    }


def may_be_kept(tensor: Tensor) -> bool:
    """Whether a tensor is dense, and not an inference tensor."""
    return tensor.layout is torch.strided and not tensor.is_inference()


def may_be_trained(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that an optimizer may train."""
    return tensor.requires_grad and tensor.is_leaf


def _numbers(values: Collection[Any]) -> list[Any]:
    kinds = {kind for kind in set(map(type, values)) if issubclass(kind, Number)}  # there may be many values
    return [value for value in values if type(value) in kinds] if kinds else []


def _are_same(values: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the identical objects."""
    return len(values) == len(others) and all(map(operator.is_, values, others))


def storage_of(tensor: Tensor | None) -> tuple[str, int]:
    """A key for the memory that a tensor occupies; its identity where the memory cannot be told."""
    try:
        return "storage", tensor.untyped_storage().data_ptr() or id(tensor)
    except (AttributeError, NotImplementedError, RuntimeError):  # None, sparse, or a wrapper around other tensors
        return "storage", id(tensor)
