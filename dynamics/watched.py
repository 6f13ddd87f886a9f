"""A loader under watch: it yields what the loader yields, and each batch is told of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

_OWN = ("_loader", "_begins", "_sees", "_taken")


def watched(loader: Iterable, begins: Callable[[], Callable[..., None]], sees: Callable[[Any], None]) -> Watched:
    """The loader, such that each pass over it ``begins``, and ``sees`` every batch before it is used.

    What ``begins`` returns is called when the pass ends, with ``whole=False`` if the loop has let go of it before.

    Of an iterator, an iterator. The loader is asked for an iterator, and for batches, when a loop asks for them, so
    that random numbers are drawn in the order in which they would be drawn without.
    """
    kind = WatchedIterator if isinstance(loader, Iterator) else Watched
    return kind(loader, begins, sees)


class Watched:
    """As long as the loader; what else the loader has is asked of it, and set there."""

    def __init__(
        self, loader: Iterable, begins: Callable[[], Callable[..., None]], sees: Callable[[Any], None]
    ) -> None:
        self._loader, self._begins, self._sees = loader, begins, sees

    def __len__(self) -> int:
        return len(self._loader)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """The loader's own: its data set, say."""
        if name.startswith("_"):
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
        return _Pass(iter(self._loader), self._begins, self._sees)


class _Pass:
    """One pass over a loader; it goes on after an exception if the loader's own does."""

    def __init__(
        self, batches: Iterator, begins: Callable[[], Callable[..., None]], sees: Callable[[Any], None]
    ) -> None:
        self._batches, self._begins, self._sees = batches, begins, sees
        self._begun, self._ends = False, _nothing

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._ends = self._begins()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._end(whole=True)
            raise
        self._sees(batch)
        return batch

    def _end(self, *, whole: bool = False) -> None:
        ends, self._ends = self._ends, _nothing  # once: another pass may have begun since
        ends(whole=whole)

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


def _nothing(*, whole: bool) -> None:
    pass
