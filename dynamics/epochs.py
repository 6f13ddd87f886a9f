"""Epochs: which passes over the data are some, and which only look."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .batches import Batches


class _Pass(NamedTuple):
    """A pass over the data that has begun, and what there was before."""

    epoch: int
    since: int
    step: int
    backwards: int
    batches: Any


class Epochs:
    """Counts passes over the data by the steps that are taken in them.

    A pass in which none was taken is no epoch by itself: it was an evaluation, or a look at a batch. If steps follow
    it, though, before another pass begins, all was read before it was used, and they are of that epoch. A pass without
    a step inside another one leaves no trace: the batches of that one are then the ones that wait for their step.

    Attributes:
        present: the epoch that it is, from 0.
    """

    def __init__(self, present: int, batches: Batches, step: Callable[[], int]) -> None:
        self.present, self._batches, self._step = present, batches, step
        self._since = 0  # the step at which the present one began
        self._any = self._read = False
        self._open: list[_Pass] = []

    def begin(self) -> None:
        """One begins, says the loop."""
        self._batches.begin_epoch()
        self.present += int(self._any or self._step() > 0)
        self._any, self._read, self._since = True, False, self._step()

    def begin_pass(self) -> Callable[..., None]:
        """A pass over watched data begins; what is to be called when it ends."""
        step = self._step()
        one = _Pass(self.present, self._since, step, self._batches.mark.backwards, self._batches.waiting)
        self._open.append(one)
        self._batches.begin_epoch()
        self._count(step)
        return partial(self._end, one)

    def _count(self, step: int) -> None:
        self.present += step > self._since
        self._any, self._read, self._since = True, False, step

    def _end(self, one: _Pass, *, whole: bool) -> None:
        self._open = [other for other in self._open if other is not one]
        if self._step() > one.step or self._batches.mark.backwards > one.backwards:
            self._batches.leave(whole=whole)
            return
        self.present, self._since = one.epoch, one.since
        if self._open:
            self._batches.wait_again(one.batches)
        else:
            self._read = whole
            self._batches.leave(whole=whole)

    def told(self) -> None:
        """The loop says itself what its batches are: not those of a pass that it read before."""
        self._read = False

    def step(self) -> None:
        """A step begins."""
        if self._read:
            self._count(self._step())
