"""What a loop logs, and to which step it belongs: the next one or the last one."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple, TypeAlias

from torch import Tensor

from .seen import Position

Scalar: TypeAlias = float | Tensor


class _Entry(NamedTuple):
    """A scalar, where the loop was when it was logged, and whether a batch was waiting for its step then."""

    value: Scalar
    position: Position
    waited: bool


class WaitingScalars(NamedTuple):
    """A snapshot of :class:`Logged`: the scalars of the last step and those that wait for theirs, and its flags."""

    of_last: dict[str, list[_Entry]]
    initial: set[str]
    upcoming: dict[str, list[_Entry]]
    before: set[str]
    announced: bool
    watched: bool
    waits: bool
    pass_ended: bool


class Logged:
    """Scalars by name, averaged over the micro-batches of a step.

    A scalar belongs to the next step if a batch is waiting for that, else to the last step. What is logged before all
    training belongs to the first step, unless that step logs the same name itself. Without batches, backward passes
    tell: a name that was first logged before the first backward pass is taken to come before its own every time. Any
    other name comes after its own, and so belongs to the next step if a backward pass came since the last step. If that
    pass turns out to have no part in the step, because it trained another network, the scalar goes to the last step if
    that still lacks the name. Where batches are observed one by one and not watched, a name that was first logged
    before the first batch is likewise taken to come before its own batch every time.
    """

    def __init__(self) -> None:
        self._of_last: dict[str, list[_Entry]] = {}
        self._initial: set[str] = set()  # names whose scalar of the first step was logged before all training
        self._upcoming: dict[str, list[_Entry]] = {}
        self._before: set[str] = set()  # names that are logged before the backward pass, or the batch, of their step
        self._announced = self._watched = self._waits = self._stepped = False
        self._pass_ended = False  # whether a pass over the data has ended since the last batch
        self._paused: tuple[int, dict[str, int]] = 0, {}  # backward passes, and entries by name, at :meth:`pause`
        self._first: int | None = None  # first backward pass of the step under way, as known at its first pause

    def so_far(self, position: Position) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """The scalars of the last step and of the one under way, as if that had been done when it paused."""
        other = copy(self)
        other._of_last, other._initial = dict(self._of_last), set(self._initial)
        other._upcoming = {name: list(entries) for name, entries in self._upcoming.items()}
        return other.step(position, late=True), other._means()

    def add(self, name: str, value: Scalar, position: Position, *, of_evaluation: bool = False) -> None:
        """Keep a scalar for the step that it belongs to; one ``of_evaluation`` tells nothing of the order in a step."""
        known = not (of_evaluation or (self._announced and not self._waits))
        if known and not (self._stepped or self._under_way or position.backwards):
            self._before.add(name)
        comes_before = name in self._before and not of_evaluation
        entry = _Entry(value, position, self._waits and not self._pass_ended)
        if self._waits or position.pending or self._under_way or comes_before or not self._stepped:
            self._upcoming.setdefault(name, []).append(entry)
        else:
            self._add_to_last(name, [entry])

    @property
    def _under_way(self) -> bool:
        """Whether some, but not all, of several optimizers have stepped."""
        return self._first is not None

    def _add_to_last(self, name: str, entries: list[_Entry]) -> None:
        if name in self._initial:
            self._initial.remove(name)
            del self._of_last[name]
        self._of_last[name] = [*self._of_last.get(name, ()), *entries]  # one assignment: a signal handler may flush

    @property
    def waiting(self) -> WaitingScalars:
        """What is known now, and what waits for its step; :meth:`wait_again` restores it."""
        return WaitingScalars(
            dict(self._of_last),
            set(self._initial),
            {name: list(entries) for name, entries in self._upcoming.items()},
            set(self._before),
            announced=self._announced,
            watched=self._watched,
            waits=self._waits,
            pass_ended=self._pass_ended,
        )

    def wait_again(self, waiting: WaitingScalars, position: Position) -> None:
        """Restore ``waiting``, as if no batch had been observed since; what was logged since is logged now."""
        now = [*self._of_last.items(), *self._upcoming.items()]
        known = {id(one) for of in (waiting.of_last, waiting.upcoming) for entries in of.values() for one in entries}
        self._of_last, self._initial, self._upcoming, self._before, *flags = waiting
        self._announced, self._watched, self._waits, self._pass_ended = flags
        for name, entries in now:
            for entry in (one for one in entries if id(one) not in known):
                self.add(name, entry.value, position, of_evaluation=True)

    def batch(self, *, first: bool, watched: bool) -> None:
        """A batch was observed, the first since a step or a further one; ``watched``: by iterating over a loader."""
        if watched and not self._announced:
            self._before.clear()  # what was logged before all training says nothing about the order within a step
        dropped = first and watched and self._watched  # below, unless it is given back
        self._announced = self._waits = True
        self._watched = watched
        if first or self._pass_ended:
            self._give_back(ends=dropped)
        if first:
            self._upcoming = {
                name: own
                for name, entries in self._upcoming.items()
                if (not self._stepped or self._comes_before(name))
                and (own := [one for one in entries if not one.waited])
            }
        self._pass_ended = False

    def pass_over(self, *, unused: bool) -> None:
        """A pass over the data has ended: no batch waits for a step any more, except those whose gradients are there.

        An ``unused`` batch still waits if it was read ahead, but not if it was skipped; what the loop does next tells.
        """
        self._waits, self._pass_ended = self._waits and unused, True

    def pause(self, position: Position) -> None:
        """Some of several optimizers have stepped; if one of these is the next to step, that is another step."""
        self._paused = position.backwards, {name: len(entries) for name, entries in self._upcoming.items()}
        self._first = position.first_backward if self._first is None else self._first

    def step(self, position: Position, *, late: bool = False) -> dict[str, Scalar]:
        """A step is done; returns the scalars of the one before. Those logged for a batch that got no step are dropped.

        If ``late``, the step was done when it paused and the next one is under way: what was logged since, and belongs
        to the next, is kept for it.
        """
        later = self._take_later() if late else {}
        if self._first is not None:  # gradients of optimizers that stepped since may have been set to zero
            position = position._replace(first_backward=min(position.first_backward, self._first))
        if not position.backwards:  # the loop sets gradients itself: a name that the last batch lacks comes after it
            self._before -= {name for name in self._before if self._lacks_last(name, position)}
        kept: dict[str, list[_Entry]] = {}
        for name, entries in self._upcoming.items():
            if own := [one for one in entries if self._counts(name, one, position)]:
                kept[name] = own
                self._upcoming[name] = [one for one in entries if not self._counts(name, one, position)]
        self._first = None
        self._give_back()
        values, initial = self._means(), {}
        if not self._stepped:
            initial = {
                name: own
                for name, entries in self._upcoming.items()
                if name not in kept and (own := [one for one in entries if self._is_initial(one)])
            }
        self._of_last, self._initial = kept | initial, set(initial)
        self._upcoming, self._waits, self._stepped = later, late, True
        return values

    def _is_initial(self, entry: _Entry) -> bool:
        """Whether a scalar was logged before all training."""
        return not (entry.waited if self._announced else entry.position.backwards)

    def _lacks_last(self, name: str, step: Position) -> bool:
        """Whether a name was logged for batches of a step, but not for its last one."""
        entries = self._upcoming.get(name, ())
        return bool(entries) and all(one.waited and one.position.batches < step.batches for one in entries)

    def _take_later(self) -> dict[str, list[_Entry]]:
        (backwards, paused), later = self._paused, {}
        for name, entries in self._upcoming.items():
            since = entries[paused.get(name, 0) :]
            later[name] = [one for one in since if name in self._before or one.position.backwards > backwards]
            self._upcoming[name] = entries[: len(entries) - len(later[name])]
        return later

    def of_last(self, *, ends: bool = False) -> dict[str, Scalar]:
        """The scalars of the last step; if the training ``ends``, with those that waited for a step that never came."""
        if ends:
            self._give_back(ends=True)
        return self._means()

    def _means(self) -> dict[str, Scalar]:
        return {name: _mean([one.value for one in entries]) for name, entries in self._of_last.items()}

    def _comes_before(self, name: str) -> bool:
        """Whether a name is logged before the batch of its step is observed."""
        return name in self._before and not self._watched

    def _counts(self, name: str, entry: _Entry, step: Position) -> bool:
        if self._announced and step.batches:
            used = entry.position.batches in step.used if step.used else entry.position.batches > 0
            last = entry.position.pending and entry.position.backwards == step.backwards  # after its last backward pass
            read = last and entry.position.batches == step.batches  # and after all batches that were read ahead
            return used or read or (self._comes_before(name) and not entry.waited)
        return entry.position.backwards >= step.first_backward - (name in self._before)

    def _give_back(self, *, ends: bool = False) -> None:
        if not self._stepped or self._under_way:
            return
        lacks = self._upcoming.keys() - (self._of_last.keys() - self._initial)
        for name in lacks if ends else lacks - self._before:
            if own := [one for one in self._upcoming[name] if not one.waited]:
                self._add_to_last(name, own)
                self._upcoming[name] = [one for one in self._upcoming[name] if one.waited]


def _mean(values: list[Scalar]) -> Scalar:
    return values[0] if len(values) == 1 else sum(values) / len(values)
