"""A watched loader: it yields what the loader yields, and reports each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .epochs import Pass

_OWN = ("_loader", "_begins", "_taken")


def watched(loader: Iterable, begins: Callable[[], Pass]) -> Watched:
    """The loader, such that each pass over it ``begins``, and what that returns is told of batches and of the end.

    Of an iterator, an iterator. The loader is asked for an iterator, and for batches, when a loop asks for them, so
    that random numbers are drawn in the order in which they would be drawn without.
    """
    kind = WatchedIterator if isinstance(loader, Iterator) else Watched
    return kind(loader, begins)


class Watched:
    """As long as the loader; what else the loader has is asked of it, and set there."""

    def __init__(self, loader: Iterable, begins: Callable[[], Pass]) -> None:
        self._loader, self._begins = loader, begins

    def __len__(self) -> int:
        return len(self._loader)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """The loader's own: its data set, say."""
        if name.startswith("__") or name in _OWN:  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the loader's own."""
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._loader, name)

    def __getitem__(self, index: Any) -> Any:
        return self._loader[index]

    def __iter__(self) -> Iterator:
        return _Pass(iter(self._loader), self._begins)


class _Pass:
    """One pass over a loader; it goes on after an exception if the loader's own does."""

    def __init__(self, batches: Iterator, begins: Callable[[], Pass]) -> None:
        self._batches, self._begins = batches, begins
        self._begun, self._open = False, None

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
        one, self._open = self._open, None  # once: another pass may have begun since
        if one is not None:
            one.ends(whole=whole)

    __del__ = _end


class WatchedIterator(Watched):
    """One from which ``next()`` takes batches, too: all that are taken so are of one pass."""

    _taken: Iterator | None = None

    def __next__(self) -> Any:
        if self._taken is None:
            self._taken = iter(self)
        try:
            return next(self._taken)
        except StopIteration:  # some begin anew when they are asked again
            self._taken = None
            raise
