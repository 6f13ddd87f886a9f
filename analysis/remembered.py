"""Caches the analyses of a run while several figures and tables ask for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import xarray as xr

Found = TypeVar("Found")

_MEMORY: ContextVar[dict[tuple, tuple[xr.DataTree, Any]] | None] = ContextVar("_MEMORY", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, each :func:`remembered` analysis of a run is computed only once; the runs must not change meanwhile."""
    token = _MEMORY.set({} if (memory := _MEMORY.get()) is None else memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def remembered(analyse: Callable[..., Found]) -> Callable[..., Found]:
    """Decorates an analysis so that :func:`remembering` caches it; each caller gets a shallow copy of the result."""

    @functools.wraps(analyse)
    def once(run: xr.DataTree, **settings: Any) -> Found:
        memory = _MEMORY.get()
        if memory is None:
            return analyse(run, **settings)
        key = analyse, id(run), *settings.items()
        if key not in memory:
            memory[key] = run, analyse(run, **settings)  # the run stays alive, so that no other gets its id
        return copy.copy(memory[key][1])

    return once
