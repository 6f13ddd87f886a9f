"""Counts backward passes: how many there were, and how many are accumulated in the present gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class BackwardPasses:
    """The backward passes that arrive at parameters, counted at a few of these, because hooks on all would cost time.

    ``parameters`` lists those that are trained now: nobody need ever set the gradients of others to zero. Gradients
    that are ``averaged`` over replicas are written once more when a backward pass ends.

    From the first step on, the first and the last parameter that got gradients are counted at. When neither gets any,
    because both are frozen or in another part of the network, all are watched for one more step, and one that gets
    gradients is added.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]], *, averaged: bool = False) -> None:
        self._parameters, self._averaged = parameters, averaged
        self._before = 0  # backward passes until the last step
        self._counters: list[_Counter] = []
        self._chosen: list[_Counter] = []
        self._look_at_all()

    def __bool__(self) -> bool:
        return bool(self._counters)

    @property
    def total(self) -> int:
        """How many backward passes there were so far."""
        return self._before + max((counter.arrived for counter in self._counters), default=0)

    @property
    def count(self) -> int:
        """How many backward passes are accumulated in the present gradients; 0 if unknown, or if there are none."""
        arrived = [counter.count for counter in self._counters if counter.arrived and counter.count]
        return max(arrived, default=next((counter.count for counter in self._counters if counter.count), 0))

    @property
    def wasted(self) -> int:
        """How many backward passes since the last step had their gradients discarded."""
        return max(self.total - self._before - self.count, 0)

    @property
    def pending(self) -> bool:
        """Whether a backward pass came since the last step."""
        return any(counter.arrived for counter in self._counters)

    @property
    def are_gone(self) -> bool:
        """Whether all gradients are None."""
        return all(counter.parameter.grad is None for counter in self._counters)

    def stepped(self) -> None:
        """A step is taken with the present gradients."""
        self.choose()
        self._before = self.total
        for counter in self._counters:
            counter.arrived = 0
        if self._chosen and all(counter.is_idle for counter in self._chosen):
            self._look_at_all()

    def choose(self) -> None:
        """Count at few parameters from now on, if gradients have arrived."""
        if len(self._counters) <= len(self._chosen):
            return
        arrived = [counter for counter in self._counters if counter.arrived]
        if new := [counter for counter in arrived if counter not in self._chosen]:
            added = new[-1:] if self._chosen else [new[0], *new[1:][-1:]]
            for counter in self._counters:
                if counter not in self._chosen and counter not in added:
                    counter.remove()
            self._chosen = self._counters = self._chosen + added

    def _look_at_all(self) -> None:
        known = {id(counter.parameter) for counter in self._counters}
        self._counters = self._counters + [
            _Counter(parameter, averaged=self._averaged)
            for parameter in self._parameters()
            if parameter.requires_grad and id(parameter) not in known
        ]

    def close(self) -> None:
        """Remove all hooks."""
        for counter in self._counters:
            counter.remove()


class _Counter:
    """Counts the backward passes accumulated in a parameter's gradient; ``arrived`` counts all since the last step."""

    def __init__(self, parameter: Tensor, *, averaged: bool) -> None:
        self.parameter, self._averaged = parameter, averaged
        self.count = self.arrived = 0
        self._before: tuple[weakref.ref, int] | None = None
        self._hook = parameter.register_post_accumulate_grad_hook(self._arrived)
        self._come_first()
        self.remove = self._hook.remove

    def _come_first(self) -> None:
        """Move the hook before the loop's own, with which an optimizer may step in the backward pass.

        Autograd calls them in the order of the dictionary beneath their table, which the table's own methods leave.
        """
        hooks: Any = self.parameter._post_accumulate_grad_hooks
        for key in [key for key in hooks if key != self._hook.id]:
            hooks[key] = hooks.pop(key)

    @property
    def is_idle(self) -> bool:
        """Whether the parameter is not being trained: it is frozen, or has no gradient."""
        return self.parameter.grad is None or not self.parameter.requires_grad

    def _arrived(self, parameter: Tensor) -> None:
        grad: Any = parameter.grad
        self.arrived += 1
        if grad is None or grad.layout is not torch.strided or grad.requires_grad:
            self.count = 0  # set to None already, or a new tensor at each pass: impossible to tell
            return
        gone = self._before is None or self._before[0]() is not grad or self._before[1] + 1 != grad._version
        self.count = 1 if gone else self.count + 1
        self._has_come()
        if self._averaged:  # DDP queues the callback that averages after ours, so ours queues itself again, behind it
            at_the_end = Variable._execution_engine.queue_callback
            at_the_end(lambda: at_the_end(self._has_come))

    def _has_come(self) -> None:
        if (grad := self.parameter.grad) is not None:
            self._before = weakref.ref(grad), grad._version
