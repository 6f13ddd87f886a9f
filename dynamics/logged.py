"""What a loop logs, and of which step it is: of the one to come, or of the one that was."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .batches import Mark

Scalar = float | Tensor


class _Entry(NamedTuple):
    """A scalar, where the loop was when it came, and whether a batch was waiting for its step then."""

    value: Scalar
    mark: Mark
    waited: bool


class Logged:
    """Scalars by name, averaged over the micro-batches of a step.

    They are of the step to come where a batch is waiting for one, else of the step that was. Without a batch backward
    passes tell: a name that comes before the first of all always comes before its own; another comes after it, and is
    of the step to come if one came since the last step. Where that then has no part in the step, for it was for
    another network's sake, the scalar is of the step that was, if that still lacks it.
    """

    def __init__(self) -> None:
        self._of_last: dict[str, list[Scalar]] = {}
        self._upcoming: dict[str, list[_Entry]] = {}
        self._before: set[str] = set()  # names that come before the backward pass of their step
        self._announced = self._waits = self._stepped = False

    def add(self, name: str, value: Scalar, mark: Mark) -> None:
        """Keep a scalar."""
        known = not self._announced or (self._waits and mark.counts)
        if not self._stepped and known and not mark.backwards:
            self._before.add(name)
        if self._waits or mark.pending or name in self._before or not self._stepped:
            self._upcoming.setdefault(name, []).append(_Entry(value, mark, self._waits))
        else:
            self._of_last.setdefault(name, []).append(value)

    @property
    def waiting(self) -> Any:
        """What waits for its step now, to :meth:`wait_again`."""
        return {name: list(entries) for name, entries in self._upcoming.items()}, self._announced, self._waits

    def wait_again(self, waiting: Any) -> None:
        """As if no batch had been observed since. What was logged meanwhile is of the step that was, if one was."""
        upcoming, announced, waits = waiting
        known = {id(one) for entries in upcoming.values() for one in entries}
        for name, entries in self._upcoming.items():
            for entry in (one for one in entries if id(one) not in known):
                if self._stepped and not waits:
                    self._of_last.setdefault(name, []).append(entry.value)
                else:
                    upcoming.setdefault(name, []).append(entry._replace(mark=entry.mark._replace(batches=0)))
        self._upcoming, self._announced, self._waits = upcoming, announced, waits

    def batch(self, *, first: bool) -> None:
        """A batch was observed, the first since a step or a further one."""
        self._announced = self._waits = True
        if first:
            self._give_back()
            self._upcoming = {}

    def step(self, mark: Mark) -> dict[str, Scalar]:
        """A step is done: the scalars of the one before. What came for a batch that no step is of is dropped."""
        kept: dict[str, list[Scalar]] = {}
        for name, entries in self._upcoming.items():
            if own := [one.value for one in entries if self._counts(name, one.mark, mark)]:
                kept[name] = own
                self._upcoming[name] = [one for one in entries if not self._counts(name, one.mark, mark)]
        values, self._of_last = self.of_last(), kept
        self._upcoming, self._waits, self._stepped = {}, False, True
        return values

    def of_last(self) -> dict[str, Scalar]:
        """The scalars of the step that was."""
        self._give_back()
        return {name: _mean(values) for name, values in self._of_last.items()}

    def _counts(self, name: str, at: Mark, step: Mark) -> bool:
        if self._announced:
            return at.batches > step.first_batch
        return at.backwards >= step.first_backward - (name in self._before)

    def _give_back(self) -> None:
        if not self._stepped:
            return
        for name in self._upcoming.keys() - self._of_last.keys() - self._before:
            if own := [one.value for one in self._upcoming[name] if not one.waited]:
                self._of_last[name] = own
                self._upcoming[name] = [one for one in self._upcoming[name] if one.waited]


def _mean(values: list[Scalar]) -> Scalar:
    return values[0] if len(values) == 1 else sum(values) / len(values)
