"""Epochs: which pass over the data each step belongs to, and which passes only evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..loop.batches import Batches
from ..loop.logged import Logged
from .resuming import Place


class Epochs:
    """Counts the passes over watched data in which steps are taken, unless the loop counts them itself.

    Without watched data, ``log_epoch`` separates epochs.

    A step belongs to the pass that yielded its last batch. A pass in which the model ran without any backward pass or
    step was an evaluation and leaves no trace: batches and logged values that waited for a step before it still do.
    Gradients that were disabled whenever it yielded a batch tell of an evaluation, too: of a compiled model in eval
    mode, whose passes are not seen, or of another model within a step. Between steps the batches may have been read
    ahead, but what was logged is no step's.

    After a checkpoint from amid an epoch, as the record tells that goes on from it, or was flushed there, the first
    pass is the rest of that epoch.

    Attributes:
        present: the epoch of the last step, from 0.
        last: the pass that yielded a batch last, and was no evaluation.
        counts: how many batches the passes before it yielded, by their end.
    """

    def __init__(self, place: Place, batches: Batches, logged: Logged, number: Callable[[], int]) -> None:
        self.present, self.batches, self.logged, self.number = place.epoch, batches, logged, number
        self.last: Pass | None = None
        self._by_hand = self._watched = False
        self._stepped = place.rows > 0
        self._ended, self._within = self._stepped and place.ended, place.within
        self._flushed_within = -1  # at which step the record was last flushed within a pass
        self.counts: set[int] = set()

    def within(self, number: int, *, fails: bool) -> bool:
        """Whether a training that resumes at a step, to which the record is being flushed, goes on with a pass.

        A pass that the loop abandons after that, or because it ``fails``, still goes on, unless it has yielded as many
        batches as an earlier one did before it ended, or was abandoned.
        """
        of = self.last
        if of is None or of.epoch is None or of.over or of.given in self.counts or self._by_hand:
            return False
        if (of.open or fails) and (of.unread or self.batches):
            self._flushed_within = number
        return self._flushed_within == number

    def begin(self, *, anew: bool) -> None:
        """The loop, which counts epochs itself, says that one begins or, if not ``anew``, goes on."""
        self.batches.begin_epoch()
        self.present += int(anew and (self._by_hand or self._stepped))
        self._by_hand = True

    def end(self) -> None:
        """A row of ``/epochs`` was logged: in a loop that neither watches data nor counts epochs, this ends an epoch.

        Before the first step, no epoch ends. A pass that the loop has abandoned before that is over.
        """
        self._ended = self._stepped
        if self.last is not None and not self.last.open:
            self.last.over = True

    def step(self) -> None:
        """A step begins."""
        of = self.batches.source or self.last
        if of is not None and not (self._by_hand or of.drawn):
            self._watched = True
            if of.epoch is None:
                of.epoch = self.present + (self._stepped and not self._within)
            self.present = max(self.present, of.epoch)
        elif self._ended and not (self._by_hand or self._watched):
            self.present += 1
        self._ended = self._within = False
        self._stepped = True


class Pass:
    """A pass over watched data that has begun; it calls ``sees`` with each batch, and ``length`` may know their number.

    Attributes:
        epoch: the number of the epoch, if steps were taken.
        given: how many batches it has yielded.
        drawn: whether it only drew a single batch, as ``next(iter(loader))`` does: that is no epoch.
        open: whether it goes on.
        over: whether the loop would not go on with it: it was not abandoned, or an epoch was logged after that.
    """

    def __init__(self, epochs: Epochs, sees: Callable[..., None], length: Callable[[], int | None]) -> None:
        self._epochs, self._sees, self._length = epochs, sees, length
        self.epoch: int | None = None
        self.open, self.over, self.drawn = True, False, False
        self.given = 0
        self._with_gradients = False  # whether they were enabled at any of its batches
        self._before = epochs.last, epochs.number(), epochs.batches.position.backwards
        self._waiting = epochs.batches.waiting, epochs.logged.waiting
        self._within_step = bool(epochs.batches) or epochs.batches.position.pending
        epochs.batches.begin_epoch()
        self._ran = epochs.batches.look_for_evaluation()

    def gives(self, batch: Any) -> None:
        """The pass yields a batch to the loop."""
        if (last := self._epochs.last) is not self:
            if last is not None and last.epoch is not None and not last.open:
                self._epochs.counts.add(last.given)
            self._epochs.last = self
        self.given += 1
        self._with_gradients |= torch.is_grad_enabled()
        self._sees(batch, source=self)

    @property
    def unread(self) -> bool:
        """Whether there may be batches that the pass has not yielded yet."""
        length = self._length()
        return length is None or self.given < length

    def ends(self, *, whole: bool) -> None:
        """The pass is complete or, if not ``whole``, the loop has abandoned it."""
        self.open, self.over = False, whole
        batches, (last, step, backwards), waiting = self._epochs.batches, self._before, self._waiting
        self._before = self._waiting = None  # else each pass would keep the one before, and its batches, alive
        idle = self._epochs.number() == step and batches.position.backwards == backwards
        self.drawn = idle and not whole and self.given == 1
        without = idle and self.given > 0 and not self._with_gradients
        evaluated = (idle and self._ran()) or (without and (self._within_step or batches.may_run_unseen))
        if evaluated:
            batches.wait_again(waiting[0])
        else:
            batches.end_epoch(whole=whole, idle=idle)
        if evaluated or without:
            self._epochs.last = last
            self._epochs.logged.wait_again(waiting[1], batches.position)
        elif self._epochs.last is self and not self.drawn:
            self._epochs.logged.pass_over(unused=whole and not batches.all_used)
