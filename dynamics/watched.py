"""A loader under watch: it yields what the loader yields, and each batch is told of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def watched(
    loader: Iterable, begins: Callable[[], None], sees: Callable[[Any], None], ends: Callable[..., None]
) -> Watched:
    """The loader, such that each pass over it ``begins`` and ``ends``, and ``sees`` every batch before it is used.

    It ends with ``whole=False`` if the loop has let go of it before.

    Of an iterator, an iterator. The loader is asked for an iterator, and for batches, when a loop asks for them, so
    that random numbers are drawn in the order in which they would be drawn without.
    """
    kind = WatchedIterator if isinstance(loader, Iterator) else Watched
    return kind(loader, begins, sees, ends)


class Watched:
    """As long as the loader; what else the loader has is asked of it."""

    def __init__(
        self, loader: Iterable, begins: Callable[[], None], sees: Callable[[Any], None], ends: Callable[..., None]
    ) -> None:
        self._loader, self._begins, self._sees, self._ends = loader, begins, sees, ends

    def __len__(self) -> int:
        return len(self._loader)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """The loader's own: its data set, say."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator:
        return _Pass(iter(self._loader), self._begins, self._sees, self._ends)


class _Pass:
    """One pass over a loader; it goes on after an exception if the loader's own does."""

    def __init__(
        self, batches: Iterator, begins: Callable[[], None], sees: Callable[[Any], None], ends: Callable[..., None]
    ) -> None:
        self._batches, self._begins, self._sees, self._ends = batches, begins, sees, ends
        self._begun = self._ended = False

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._begins()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._end(whole=True)
            raise
        self._sees(batch)
        return batch

    def _end(self, *, whole: bool = False) -> None:
        if self._begun and not self._ended:  # once: another pass may have begun since
            self._ended = True
            self._ends(whole=whole)

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
