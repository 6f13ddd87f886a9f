"""What was found of a run, remembered while several analyses, figures and tables ask for it."""

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
    """Inside, what is :func:`remembered` is computed once of each run: nobody changes the runs meanwhile."""
    token = _MEMORY.set({} if (memory := _MEMORY.get()) is None else memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def remembered(analyse: Callable[..., Found]) -> Callable[..., Found]:
    """An analysis of a run that is asked for again and again; each is given a copy of its own, of the same arrays."""

    @functools.wraps(analyse)
    def once(run: xr.DataTree, **settings: Any) -> Found:
        memory = _MEMORY.get()
        if memory is None:
            return analyse(run, **settings)
        key = analyse, id(run), *settings.items()
        if key not in memory:
            memory[key] = run, analyse(run, **settings)  # with the run, or another one might get its number
        return copy.copy(memory[key][1])

    return once
