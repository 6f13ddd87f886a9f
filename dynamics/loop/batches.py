"""The batches that a step is made of: those whose gradients are in ``.grad`` when the optimizer steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..network.wrappers import is_compiled, unwrap
from ..probing.bystanders import Bystanders
from ..probing.moment import Moment
from ..probing.objective import Objective
from .backward_passes import BackwardPasses
from .forward_passes import ForwardPasses
from .moments import Moments
from .reading_ahead import ReadingAhead
from .seen import Position, Ran, Seen, candidates, used
from .too_many import TooMany

_NO_SHARE = 1e-4  # of the largest share


class WaitingBatches(NamedTuple):
    """A snapshot of :class:`Batches`: the batches that wait for their step, and the one that stays, if one does.

    ``ran`` says how the model has run on each.
    """

    seen: list[Seen]
    ran: list[Ran]
    staying: list[Any]
    of_epoch: int
    stays_surely: bool


class Batches:
    """The batches seen since the last step whose gradients have not been discarded.

    Gradients accumulate over micro-batches, but the gradient of a skipped batch (by ``continue``, or by a gradient
    scaler that found an infinity) is set to zero again. :meth:`candidates` lists the batches that the step may be made
    of; the applied gradient decides among them. A batch that stays is used by all further steps until the next one is
    seen. ``asleep()`` says whether a recorder is evaluating a model, so that forward passes are not the loop's.

    Attributes:
        moments: the moments of the batches.
        bystanders: the modules outside the model that run.
        told: whether any batch was seen so far.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        objective: Objective,
        counted: Callable[[], Sequence[Tensor]],
        held: Callable[[], Sequence[nn.Parameter]],
        asleep: Callable[[], bool],
        *,
        averaged: bool,
    ) -> None:
        self._own, self._compiled = unwrap(model), is_compiled(model)
        self._seen: list[Seen] = []
        self._staying: list[Any] = []  # the batch that stays, if one does
        self._stays_surely = True
        self._after_step: Moment | None = None  # from which a further step on the batch that stays may begin
        self._of_epoch = 0  # how many of the batches seen came from earlier passes over the data
        self._reading = ReadingAhead()
        self._stepped_at = 0  # the number of backward passes until the last step
        self._read = 0  # how many batches were read since
        self._candidates: list[list[Seen]] = []
        self._backward = BackwardPasses(counted, averaged=averaged)
        self._forward = ForwardPasses(self._own, self._pass_begins, self._evaluation_begins)
        self.moments = Moments(self._own, device, objective, self._backward, held)
        self.bystanders = Bystanders(self._own, objective)
        self._awaits, self._asleep = False, asleep
        self._reader = threading.get_ident()
        self._too_many = TooMany(self._own, compiled=self._compiled)
        self._passes = 0  # over the data since the last step, in which nothing is known to have happened
        self.told = False

    def __len__(self) -> int:
        return len(self._seen)

    def await_forward(self) -> None:
        """Keep the moments of forward passes until the step is taken; not of a compiled model, which hooks slow."""
        self._awaits = True
        for seen in self._seen:
            self.moments.keep(seen)
        with self.moments.not_in_the_loop():
            self._after_step = self.moments.now() if self._staying else None
        if (self._seen or self._staying) and not self._compiled:
            self._watch_passes()

    def _watch_passes(self) -> None:
        with self.moments.not_in_the_loop():
            self._forward.watch()

    def _pass_begins(self, module: nn.Module) -> None:
        if self._asleep():
            return
        if (present := self._present) is not None:
            present.ran, present.only_evaluated = True, False  # it is trained on after all
        if self._awaits and not self.moments.failure:
            with self.moments.not_in_the_loop():
                self.repeat(due=True)
                self.moments.pass_begins(self._seen, module)

    def _evaluation_begins(self) -> None:
        """The model runs without gradients: it evaluates the present batch, unless that batch is trained on later."""
        if (present := self._present) is not None:
            present.evaluated = True
            present.only_evaluated |= not (present.passed or present.ran)

    @property
    def _present(self) -> Seen | None:
        """The loop's present batch: the last before those that it reads ahead; None if its step was taken."""
        return self._seen[-1 - self._reading.count] if len(self._seen) > self._reading.count else None

    def _moment_of_last(self) -> Moment | None:
        self.repeat(due=True)
        return self.moments.of_last(self._seen)

    @property
    def source(self) -> Any:
        """The pass over the data that the step's last batch came from; None if unknown.

        That batch was read before the last backward pass, if one came, and not to be evaluated.
        """
        used = self._used
        read = self._seen[: used[-1]] if used else self._seen
        ours = [seen for seen in read if seen.with_gradients and not seen.only_evaluated] or read
        return ours[-1].source if ours else None

    def add(self, batch: Any, *, due: bool, stays: bool = False, source: Any = None) -> None:
        """Add a batch; if its step is ``due`` to be measured, keep a copy of it and its moment."""
        self.told, self._reader = True, threading.get_ident()
        if self._seen and self._seen[0].again and not self._backward.pending:  # without a backward pass
            self._seen = []
        if self._backward.pending:  # the backward pass was that of the batch that stays
            self.repeat(due=False)
        self._staying, self._stays_surely, self._after_step = [batch] if stays else [], True, None
        self._read += 1
        self._seen = self._too_many.remaining(self._seen, self._backward, self._reading.count)
        self._see(batch, due=due, source=source)

    def repeat(self, *, due: bool) -> None:
        """A further step on the batch that stays, if one does."""
        if self._staying and not self._seen:
            self._see(*self._staying, due=due, again=True)

    def leave(self, *, whole: bool = True) -> None:
        """No batch stays any longer; if the pass was not ``whole``, as the loop abandoned it, its last one may."""
        self._stays_surely = False
        if whole:
            self._staying = []

    def end_epoch(self, *, whole: bool, idle: bool) -> None:
        """A pass ends, which may be ``idle``: without any backward pass or step; but it was no evaluation."""
        self._passes += int(whole and idle)
        self.leave(whole=whole)

    def _see(self, batch: Any, *, due: bool, again: bool = False, source: Any = None) -> None:
        seen_at = self._stepped_at if again else self._backward.total
        certain, enabled = self._stays_surely or not again, torch.is_grad_enabled()
        seen = Seen(batch, None, again=again, certain=certain, source=source, seen_at=seen_at, with_gradients=enabled)
        self._seen.append(seen)
        if due:
            self.moments.keep(seen, self._after_step if again else None)
        if due and self._awaits and not self._compiled:
            self._watch_passes()
            self.bystanders.watch(self._moment_of_last, self._asleep)

    def candidates(self) -> list[list[Seen]]:
        """The lists of batches that the step about to be taken may be made of, the likeliest first."""
        self._backward.choose()
        if self._reader != threading.get_ident():
            raise RuntimeError(
                "batches are read in a thread other than that of the steps: watch what the loop itself iterates "
                "over, with recorder.watch(...) around what reads ahead"
            )
        self.moments.look_back(self._seen)
        of_epoch = self._of_epoch if self._backward else 0
        self._candidates = candidates(
            self._seen, self._used, self._backward.count, ahead=self._reading.count, of_epoch=of_epoch
        )
        return self._candidates

    def none_known(self) -> None:
        """The gradient is of none of the candidates: if no batch was read since the last step, all are for later."""
        if not self._read:
            self._reading.none_chosen(self._seen)

    def chosen(self, candidate: int, shares: Sequence[float]) -> None:
        """The gradient has chosen this candidate, in such shares: the batches after it were read ahead.

        A batch whose fitted share is zero, up to rounding, is none of the step's.
        """
        weighted = zip(self._candidates[candidate], shares, strict=True)
        batches = [seen for seen, share in weighted if share > _NO_SHARE * max(shares)] or self._candidates[candidate]
        self._reading.chosen(batches, self._seen, self._backward.count, expected=not candidate)

    @property
    def _used(self) -> list[int]:
        """What :func:`~dynamics.loop.seen.used` returns for the batches and backward passes since the last step."""
        starts = [seen.seen_at for seen in self._seen] or [self._stepped_at] * len(self._staying)
        return used(starts, self._backward.total, self._backward.count)

    @property
    def forgotten(self) -> int:
        """How many evaluated batches were too many to be kept, if the step may be of them; else 0."""
        return self._too_many.forgotten(self._seen, self._used)

    @property
    def idle_passes(self) -> int:
        """How many passes over the data since the last step left the model alone; 0 if it is compiled: none is seen."""
        return 0 if self._compiled or self._backward.pending else self._passes

    @property
    def wasted(self) -> int:
        """How many backward passes since the last step had their gradients discarded."""
        return self._backward.wasted

    @property
    def all_used(self) -> bool:
        """Whether each batch that waits for its step has had a backward pass whose gradient is still there."""
        return self._backward.pending and len(self._used) == len(self._seen)

    @property
    def position(self) -> Position:
        """Where the loop is now."""
        batches, total, count = len(self._seen) or len(self._staying), self._backward.total, self._backward.count
        first = total - count + 1 if count else 0
        return Position(batches, total, first, self._backward.pending)

    @property
    def position_of_step(self) -> Position:
        """Where the loop is when it steps, and on which batches."""
        return self.position._replace(used=self._used)

    @property
    def waiting(self) -> WaitingBatches:
        """The batches that wait for their step now; :meth:`wait_again` restores them."""
        ran = [one.how for one in self._seen]
        return WaitingBatches(list(self._seen), ran, self._staying, self._of_epoch, stays_surely=self._stays_surely)

    def look_for_evaluation(self) -> Callable[[], bool]:
        """Watch forward passes from now on; the returned function says whether any was seen (none if compiled)."""
        if not self._compiled and self.moments.failure is None:
            self._watch_passes()
        before = self._forward.count
        return lambda: self._forward.count > before

    @property
    def may_run_unseen(self) -> bool:
        """Whether the model is compiled, so that its passes are not seen, and in eval mode."""
        return self._too_many.may_run_unseen

    def wait_again(self, waiting: WaitingBatches) -> None:
        """Restore the batches that waited for their step, and forget those that came since."""
        self._seen, ran, self._staying, self._of_epoch, self._stays_surely = waiting
        for one, how in zip(self._seen, ran, strict=True):
            one.ran, one.evaluated, one.only_evaluated = how

    def begin_epoch(self) -> None:
        """A pass over the data begins."""
        self._of_epoch = len(self._seen)
        self.leave()

    @property
    def reads_ahead(self) -> bool:
        """Whether the loop reads batches before it uses them."""
        return self._reading.count > 0

    @property
    def unclear(self) -> bool:
        """Whether it is not clear which batches the last step has left, so that the next one has to be looked at."""
        return self._reading.unclear

    def step(self, *, looks: bool) -> None:
        """The step is taken; ``looks``: whether the next one can be looked at, if need be."""
        self._too_many.step(self._seen, self.wasted)
        self.clear(looks=looks)

    def clear(self, *, looks: bool = False) -> None:
        """Forget the batches whose step was taken: all except those that were read ahead."""
        self.moments.steps_here()
        if self.forgotten:
            self._seen, self._staying = [], []
        self._seen = self._reading.left(self._seen, self._used, self._backward.count, looks=looks)
        self._backward.stepped()
        self._stepped_at, self._read = self._backward.total, 0
        self._of_epoch, self._passes, self._awaits, self._after_step = 0, 0, False, None
        self._too_many.clear()
        self._forward.leave()
        self.bystanders.leave()

    def close(self) -> None:
        """Remove the hooks and drop the batches."""
        self.clear()
        self.leave()
        self._backward.close()
