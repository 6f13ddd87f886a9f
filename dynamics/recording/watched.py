"""A watched loader, which yields what the loader yields and reports each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, sampler

from .epochs import Pass

_Begins = Callable[[Callable[[], int | None]], Pass]
_OWN = ("_loader", "_begins", "_taken")


def watched(loader: Iterable, begins: _Begins) -> Watched:
    """Wrap the loader: each pass over it calls ``begins``, and reports batches and its end to what that returns.

    ``begins`` gets a function that returns the loader's length, if that is known without code of the user's.

    An iterator is wrapped as an iterator. The loader is asked for an iterator, and for batches, only when the loop asks
    for them, so that random numbers are drawn in the same order as without the wrapper.
    """
    kind = WatchedIterator if isinstance(loader, Iterator) else Watched
    return kind(loader, begins)


class Watched:
    """Yields the loader's batches; its length, and all other attributes, are read from and set on the loader."""

    def __init__(self, loader: Iterable, begins: _Begins) -> None:
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
        return _Pass(iter(self._loader), partial(self._begins, partial(_length, self._loader)))


def _length(loader: Any) -> int | None:
    """The length of a list, or of torch's own DataLoader with samplers of torch's own: others may draw to know it."""
    if isinstance(loader, DataLoader):
        samplers = loader.sampler, loader.batch_sampler
        torchs = all(type(one).__module__ == sampler.__name__ for one in samplers)
        known = torchs and type(loader).__len__ is DataLoader.__len__
        return len(loader) if known and not isinstance(loader.dataset, IterableDataset) else None
    return len(loader) if type(loader) in (list, tuple) else None


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
