"""The moments from which the losses of batches can be evaluated again, kept when batches are seen and run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.ordinary import is_batched
from ..errors import named
from ..hardware.precision import is_precise
from ..hardware.random_numbers import random_numbers_untouched
from ..network.structure import is_scripted
from ..probing.batch import copied
from ..probing.changes import changed_since
from ..probing.moment import Moment
from ..probing.objective import Objective
from .backward_passes import BackwardPasses
from .forward_passes import trains
from .seen import Seen

_SCRIPTED = (
    "a ScriptModule hides what it computes, and rounds differently once it has run several times; "
    "train the module that it was made from"
)


class Moments:
    """Keeps the moments of the batches that wait for a step; ``seen`` always lists these in the order of reading.

    The moment of a batch is when the first forward pass with gradients began after the batch was seen. The ``backward``
    passes tell which forward pass belongs to which batch.

    Attributes:
        failure: why moments are not kept any more, if they are not.
        beside: names of parameters that moved since the last forward pass although no given optimizer holds them.
        outside: tensors outside the model, that the objective refers to, of which the same is true.
        precise: whether the last forward pass was in single precision or better, as the recorder's own are.
        lost: whether the step cannot be measured, because frozen parameters have moved unexpectedly. From the next step
            on, copies of them are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        objective: Objective,
        backward: BackwardPasses,
        held: Callable[[], Sequence[nn.Parameter]],
    ) -> None:
        self._model, self._device, self._objective, self._backward = model, device, objective, backward
        trained, frozen = (
            sum(one.numel() for one in model.parameters() if one.requires_grad == wanted) for wanted in (True, False)
        )
        self._keeps_frozen = frozen <= trained  # a first guess, until a step tells whether they move
        self._moves_frozen = self.lost = False
        self._held = held
        self.beside: list[str] = []
        self.precise = False
        self.outside: list[Tensor] = []
        self.failure = _SCRIPTED if is_scripted(model) else None
        self._thread = threading.get_ident()

    @contextmanager
    def not_in_the_loop(self) -> Iterator[None]:
        """Inside, an exception does not reach the user's loop: it is noted as the ``failure``."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or named(error)

    def steps_here(self) -> None:
        """The loop steps in this thread; batches that other threads read get no moment."""
        self._thread = threading.get_ident()

    def now(self) -> Moment:
        """The present moment."""
        return Moment(self._model, self._device, self._objective, keep_frozen=self._keeps_frozen)

    def keep(self, seen: Seen, moment: Moment | None = None) -> None:
        """Keep a copy of a batch, and the present or given moment; the loop's random generators stay as they are."""
        if threading.get_ident() != self._thread:
            seen.batch = copied(seen.batch)
            return
        with self.not_in_the_loop(), random_numbers_untouched(self._device):
            moment = moment or self.now()
            if seen.changed_since is None:  # else it is a copy already
                own, seen.batch = seen.batch, copied(seen.batch)
                seen.changed_since = changed_since(own, seen.batch)
            seen.moment = seen.first_moment = moment
            seen.next_moment = None  # forward passes until now belonged to earlier steps

    def pass_begins(self, seen: Sequence[Seen], module: nn.Module) -> None:
        """A forward pass begins: of the batch that waits for one or, if none does, a further one of the last batch."""
        self.precise = is_precise(self._model, self._device)
        if (waiting := self._next_to_pass(seen, module)) is not None:
            self._first_pass_begins(seen, waiting, module)
            seen[-1].next_moment = seen[-1].next_moment or waiting.moment
        elif seen:
            self._further_pass_begins(seen[-1])

    def _next_to_pass(self, seen: Sequence[Seen], module: nn.Module) -> Seen | None:
        """The batch whose forward pass begins: the first that had none.

        When a pass in training mode begins, earlier passes in eval mode do not count if no backward pass followed them,
        or all gradients are gone.
        """
        if trains(module):
            gone = self._backward.are_gone
            for one in seen:
                if one.passed_in_eval_at is not None and (gone or one.passed_in_eval_at == self._backward.total):
                    one.passed, one.passed_in_eval_at = False, None
        waiting = [one for one in seen if not one.passed]
        return next((one for one in waiting if not one.only_evaluated), waiting[0] if waiting else None)

    def _first_pass_begins(self, seen: Sequence[Seen], waiting: Seen, module: nn.Module) -> None:
        before, waiting.moment, waiting.passed = waiting.moment, self._of_pass(waiting), True
        if waiting.changed_since is not None:
            waiting.changed = self._changed(waiting)
            waiting.changed_since = None if trains(module) else waiting.changed_since
        waiting.moment.others = before.others if before else {}
        waiting.gradient_moment = waiting.last_moment = None
        waiting.passed_at = self._backward.total
        waiting.passed_in_eval_at = None if trains(module) else self._backward.total
        for other in (one for one in seen if not one.passed):  # the pass may be one of theirs instead
            other.gradient_moment = other.last_moment = waiting.moment
            other.changed = self._changed(other) if other.changed_since is not None else None

    def _changed(self, seen: Seen) -> Any:
        """A copy of the batch if the loop has changed it, else None; copying may draw random numbers."""
        with random_numbers_untouched(self._device):
            return seen.changed_since()

    def _further_pass_begins(self, last: Seen) -> None:
        last.last_moment = again = self._of_pass(last)
        if self._backward.total == last.passed_at:
            last.gradient_moment = again
        again.others = last.moment.others | (last.later.others if last.later else {})

    def _of_pass(self, seen: Seen) -> Moment:
        """The present moment; under torch.func, which puts batched tensors into the model, the batch's earlier one."""
        if seen.moment and is_batched():
            return seen.moment.with_present_numbers()
        return self.now().of_pass(seen.first_moment)

    def of_last(self, seen: Sequence[Seen]) -> Moment | None:
        """The moment of the batch that a module outside the model runs on.

        That is the last batch whose forward pass has begun, until its backward pass comes; then the next that waits.
        """
        last = next((one for one in reversed(seen) if one.passed), None)
        if last is None or last.passed_at != self._backward.total:
            waiting = next((one for one in seen if not one.passed), None)
            if waiting is None and last is not None:
                last.later = last.later or self.now()
                return last.later
            last = waiting
        return None if last is None else last.moment

    def look_back(self, seen: Sequence[Seen]) -> None:
        """See which parameters have moved although none of the given optimizers did it.

        If frozen parameters have moved since the batches came, copies of them are kept from now on; the step is
        ``lost`` if they were not kept before. Trained ones that no given optimizer holds, and that moved since the last
        forward pass began, are listed in ``beside``, and such tensors outside the model in ``outside``: another
        optimizer may train them.
        """
        last = next((one.last_moment or one.moment for one in reversed(seen) if one.passed), None)
        changed, outside = (last.changed, last.changed_outside) if last else ({}, [])
        held = {id(one) for one in self._held()} if changed or outside else set()
        self.beside = [name for name, one in changed.items() if id(one) not in held]
        self.outside = [one for one in outside if id(one) not in held]
        first = seen[0] if seen else None  # what moved since a later one came moved since this, too
        since = None if first is None else first.moment if first.again else first.first_moment
        moved = since is not None and since.moved
        self.lost = moved and not self._keeps_frozen
        # a momentum encoder that begins as a copy of the trained network is first written with the numbers it has
        touched = self._keeps_frozen and since is not None and since.touched
        self._moves_frozen = self._keeps_frozen = self._moves_frozen or moved or touched
