"""Caches the analyses of a run, or of several, while figures and tables ask for them."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import xarray as xr

Found = TypeVar("Found")

Analysed = xr.DataTree | Mapping[str, xr.DataTree]

_MEMORY: ContextVar[dict[tuple, tuple[Analysed, Any]] | None] = ContextVar("_MEMORY", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, each :func:`remembered` analysis is computed only once; runs and mappings of them must not change."""
    token = _MEMORY.set({} if (memory := _MEMORY.get()) is None else memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def remembered(analyse: Callable[..., Found]) -> Callable[..., Found]:
    """Decorates an analysis, of a run or of a mapping of runs, so that :func:`remembering` caches it.

    Each caller gets a copy of the result, which shares its arrays if it is a dataset.
    """
    first = next(iter(inspect.signature(analyse).parameters))

    @functools.wraps(analyse)
    def once(*given: Analysed, **settings: Any) -> Found:
        memory = _MEMORY.get()
        if memory is None or len(given) + (first in settings) != 1:
            return analyse(*given, **settings)
        runs = given[0] if given else settings.pop(first)
        key = analyse, id(runs), *settings.items()
        if key not in memory:
            memory[key] = runs, analyse(runs, **settings)  # these stay alive, so that no others get their id
        return copy.copy(memory[key][1])

    return once
