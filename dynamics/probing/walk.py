"""Walks through objects and what is inside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

MOST, _DEEPEST = 1000, 4  # number and depth of objects that are searched where these may be anything
_WAITING = 10 * MOST  # number of objects that may wait to be searched, of which many may be the same


def walk(values: Iterable[Any], look: Callable[[Any], Iterable[Any]], *, bounded: bool) -> None:
    """Call ``look`` with values and with what it returns for them, each object once.

    If ``bounded``, for at most ``MOST`` objects, down to depth ``_DEEPEST``.
    """
    waiting = deque((value, 0) for value in values)
    known: set[int] = set()
    while waiting and not (bounded and len(known) == MOST):
        value, depth = waiting.popleft()
        if id(value) in known:
            continue
        known.add(id(value))
        with suppress(Exception):  # an object may be anything
            inner = look(value)
            if not (bounded and (depth == _DEEPEST or len(waiting) > _WAITING)):
                waiting.extend((one, depth + 1) for one in (islice(_different(inner), MOST) if bounded else inner))


def _different(values: Iterable[Any]) -> Iterator[Any]:
    known: set[int] = set()
    for value in values:
        if id(value) not in known:
            known.add(id(value))
            yield value
