"""One batch, whatever collections and objects it consists of: its tensors, its size, copies of it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..hardware.memory_order import channels_first
from .contents import are_equal
from .ownership import OF_OTHERS, held
from .undrawn import UndrawnIterator, is_iterator

_MOST = 10_000  # values that are examined inside a batch's objects
_COLLECTIONS = (dict, MappingProxyType, list, tuple)
_PLAIN = frozenset({str, bytes, int, float, complex, bool, type(None)})


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all tensors in its tuples, lists and mappings on the device, and all else that has a ``to``."""

    def sent(other: Any) -> Any:
        return other.to(device) if callable(getattr(type(other), "to", None)) else other

    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True), sent)


def as_measured(batch: Any, device: torch.device) -> Any:
    """The batch on the device, in the memory format in which losses are evaluated."""
    return mapped(to_device(batch, device), channels_first)


def copied(batch: Any) -> Any:
    """A copy of the batch: of every tensor, and of all else that a loop may change in place."""
    return mapped(batch, _copy_of_tensor, _copy)


def changes(batch: Any, seen: Any) -> Callable[[], Any]:
    """A function that returns a copy of the batch if the loop has changed it by then, else None.

    A change is a tensor written in place, or another one put in its place. Entries that the loop only took out of a
    mapping do not count; a copy has them as they are in ``seen``, the copy from before.
    """
    own = _contents(batch)  # keeps these tensors alive, so that no new one gets the identity of one of them
    copies = _contents(seen) if any(isinstance(one, np.ndarray) for one in own.values()) else {}
    before = {place: (one, _state(one, copies.get(place))) for place, one in own.items()}

    def changed() -> Any:
        now = _contents(batch)
        if all(place in before and _is_as(*before[place], one) for place, one in now.items()):
            return None
        present = copied(batch)
        if isinstance(present, MutableMapping) and isinstance(seen, Mapping):
            present.update({key: value for key, value in seen.items() if key not in present})
        return present

    return changed


def _contents(batch: Any) -> dict[tuple, Tensor | np.ndarray]:
    """The tensors and arrays in a batch, its collections and objects, by the path to each.

    None of the batch's own code runs: what it would load or compute is ignored. Each collection and object is
    searched once. Objects may refer to anything, so inside them at most ``_MOST`` values are examined.
    """
    found: dict[tuple, Tensor | np.ndarray] = {}
    known: dict[int, Any] = {}
    waiting: deque[tuple[tuple, Any, bool]] = deque([((), batch, False)])
    room = _MOST
    while waiting:
        place, value, behind = waiting.popleft()
        if issubclass(type(value), Tensor | np.ndarray):
            found[place] = value
        elif id(value) not in known:
            known[id(value)] = value
            behind = behind or not issubclass(type(value), _COLLECTIONS)
            inner = _inner(value) if room or not behind else ()
            parts = [(key, part) for key, part in inner if type(part) not in _PLAIN]
            if behind:
                parts = parts[:room]
                room = max(room - 1 - len(parts), 0)
            waiting.extend(((*place, key), part, behind) for key, part in parts)
    return found


def _inner(value: Any) -> Iterable[tuple[Hashable, Any]]:
    """Entries of a collection, or attributes of an object other than a network, data set, function or Python module."""
    kind = type(value)
    if issubclass(kind, dict | MappingProxyType):
        return list((dict if issubclass(kind, dict) else kind).items(value))
    if issubclass(kind, list | tuple):
        return enumerate((list if issubclass(kind, list) else tuple).__iter__(value))
    if kind.__module__ == "builtins" or issubclass(kind, (type, ModuleType, np.generic, *OF_OTHERS)):
        return ()
    return enumerate(held(value))


def _state(value: Tensor | np.ndarray, copy: Any) -> Any:
    """What shows whether a tensor or array has changed: a tensor's version counter, an array's copy."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    return copy if isinstance(copy, np.ndarray) else value.copy()  # its own copy if deepcopy failed


def _is_as(before: Any, state: Any, now: Any) -> bool:
    if isinstance(now, Tensor):
        return before is now and state == _state(now, None)
    return state is now or are_equal(state, now)


def _copy_of_tensor(tensor: Tensor) -> Tensor:
    """A copy, which is a leaf that requires gradients if the tensor is one: a loss may differentiate by its inputs."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _copy(value: Any) -> Any:
    """A copy of an array or an object; if it cannot be copied, the object itself or, of an iterator, a stand-in."""
    try:
        return copy.deepcopy(value)
    except Exception:  # it may be anything
        return UndrawnIterator(value) if is_iterator(value) else value


def layout(batch: Any) -> Hashable:
    """The structure of a batch: everything but the values of its tensors.

    Raises:
        TypeError: it holds something other than dense tensors, collections of them, strings and numbers.
    """
    if type(batch) in (Tensor, nn.Parameter) and batch.layout is torch.strided:
        return batch.shape, batch.stride(), batch.dtype
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, layout(value)) for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return type(batch), tuple(layout(value) for value in batch)
    if batch is None or isinstance(batch, str | int | float):
        return type(batch), batch
    raise TypeError(f"a batch holds a {type(batch).__name__}")


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in the batch."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, note)
    return found


def mapped(
    batch: Any, function: Callable[[Tensor], Tensor], of_others: Callable[[Any], Any] = lambda other: other
) -> Any:
    """A copy of the batch with ``function`` of every tensor in its collections, and ``of_others`` of other objects."""
    inner = partial(mapped, function=function, of_others=of_others)
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # torch wants batch_sizes on the CPU
        return type(batch)(inner(batch.data), batch.batch_sizes, *map(inner, batch[2:]))
    if isinstance(batch, Mapping):
        values = {key: inner(value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        return _with_values(batch, values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inner, batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map(inner, batch))
    return batch if isinstance(batch, str | bytes | int | float | None) else of_others(batch)


def _with_values(batch: MutableMapping, values: Mapping) -> MutableMapping:
    """A copy of a mapping that is no plain dict, such as a tokenizer's output, with these values."""
    other = copy.copy(batch)
    for name, own in getattr(other, "__dict__", {}).items():
        if type(own) is dict and own is vars(batch).get(name):  # else the batch itself would get the values
            vars(other)[name] = dict(own)
    other.update(values)
    return other


def sample_count(batch: Any) -> int:
    """Length of the first tensor in the batch, or of a list that is an entry of it; 1 if there is neither."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    parts = (value for value in values if isinstance(value, Tensor | Mapping | tuple | list))
    return next((len(part) if isinstance(part, list) else sample_count(part) for part in parts), 1)
