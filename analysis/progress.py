"""Progress bars of a command on stderr, one for each pass over runs or figures, removed when the pass is done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm.auto import tqdm

One = TypeVar("One")

_SHOWN: ContextVar[bool] = ContextVar("_SHOWN", default=False)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Inside, :func:`with_progress` shows a bar if stderr is a terminal."""
    token = _SHOWN.set(True)
    try:
        yield
    finally:
        _SHOWN.reset(token)


def with_progress(every: Collection[One], what: str, unit: str = "run") -> Iterable[One]:
    """Yield the runs or figures, inside :func:`progress_shown` with a progress bar called ``what``."""
    return tqdm(every, desc=what, unit=unit, leave=False, disable=None) if _SHOWN.get() else every
