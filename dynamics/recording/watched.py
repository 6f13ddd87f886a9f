"""A watched loader, which yields what the loader yields and reports each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from .epochs import Pass

_OWN = ("_loader", "_begins", "_taken")


def watched(loader: Iterable, begins: Callable[[int | None], Pass]) -> Watched:
    """Wrap the loader: each pass over it calls ``begins``, and reports batches and its end to what that returns.

    ``begins`` gets the loader's length, if it has one.

    An iterator is wrapped as an iterator. The loader is asked for an iterator, and for batches, only when the loop asks
    for them, so that random numbers are drawn in the same order as without the wrapper.
    """
    kind = WatchedIterator if isinstance(loader, Iterator) else Watched
    return kind(loader, begins)


class Watched:
    """Yields the loader's batches; its length, and all other attributes, are read from and set on the loader."""

    def __init__(self, loader: Iterable, begins: Callable[[int | None], Pass]) -> None:
        self._loader: Any = loader
        self._begins = begins

    def __len__(self) -> int:
        return len(self._loader)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """An attribute of the loader, such as its data set."""
        if name.startswith("__") or name in _OWN:  # a copy in the making has no attributes of its own yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the loader, except this object's own."""
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._loader, name)

    def __getitem__(self, index: Any) -> Any:
        return self._loader[index]

    def __iter__(self) -> Iterator:
        return _Pass(iter(self._loader), partial(self._begins, _length(self._loader)))


def _length(loader: Iterable) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except Exception:  # it has none, or that of an iterable data set is wrong
        return None


class _Pass:
    """One pass over a loader; after an exception it goes on if the loader's iterator does."""

    def __init__(self, batches: Iterator, begins: Callable[[], Pass]) -> None:
        self._batches, self._begins = batches, begins
        self._begun = False
        self._open: Pass | None = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._open = self._begins()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._end(whole=True)
            raise
        if self._open is not None:
            self._open.gives(batch)
        return batch

    def _end(self, *, whole: bool = False) -> None:
        one, self._open = self._open, None  # end only once: another pass may have begun since
        if one is not None:
            one.ends(whole=whole)

    __del__ = _end


class WatchedIterator(Watched):
    """A watched iterator, on which ``next()`` works, too; all batches taken so belong to one pass."""

    _taken: Iterator | None = None

    def __next__(self) -> Any:
        if self._taken is None:
            self._taken = iter(self)
        try:
            return next(self._taken)
        except StopIteration:  # some iterators start again when asked for more
            self._taken = None
            raise
