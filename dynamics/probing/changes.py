"""Tells whether a loop has changed a batch since it read it: written to its tensors, or put others in their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from .batch import copied
from .equality import are_equal
from .ownership import OF_OTHERS, held

_MOST = 10_000  # values that are examined inside a batch's objects
_COLLECTIONS = (dict, MappingProxyType, list, tuple)
_PLAIN = frozenset({str, bytes, int, float, complex, bool, type(None)})


def changed_since(batch: Any, seen: Any) -> Callable[[], Any]:
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
