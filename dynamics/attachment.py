"""Attaches to optimizers by their own hooks: says when a step's gradient is there, and when the step is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


class Attachment:
    """Hooks on one optimizer or on several that train one model.

    A step is one step of each optimizer; it also ends where one of them steps again, or at :meth:`end`. A closure is
    wrapped: its gradient is there when it first returns.

    Args:
        optimizers: the torch optimizers.
        begin: called before the first of them steps.
        ready: called with an optimizer's number when the gradient that it will apply is there.
        stepped: called with an optimizer's number right after it stepped.
        done: called after the step with the numbers of those that took it.
        asleep: while it is true, hooks do nothing.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        begin: Callable[[], None],
        ready: Callable[[int], None],
        stepped: Callable[[int], None],
        done: Callable[[list[int]], None],
        asleep: Callable[[], bool],
    ) -> None:
        self._begin, self._ready, self._is_through, self._done, self._asleep = begin, ready, stepped, done, asleep
        self._count = len(optimizers)
        self._stepping: int | None = None  # the optimizer whose step has begun
        self._stepped: set[int] = set()  # those that are through
        self._hooks = [
            hook
            for number, one in enumerate(optimizers)
            for hook in (
                one.register_step_pre_hook(partial(self._before, number)),
                one.register_step_post_hook(partial(self._after, number)),
            )
        ]

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def _before(
        self, number: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if self._asleep():
            return None
        if self._stepping is not None:  # an exception ended that step
            self._stepped = set()
        elif number in self._stepped:
            self.end()
        self._stepping = number
        if not self._stepped:
            self._begin()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._ready(number)
            return None
        measuring = self._measuring(closure, number)
        return (args, {**kwargs, "closure": measuring}) if "closure" in kwargs else ((args[0], measuring), kwargs)

    def _measuring(self, closure: Callable[[], Any], number: int) -> Callable[[], Any]:
        waiting = [number]

        def measured() -> Any:
            loss = closure()
            if waiting:
                self._ready(waiting.pop())
            return loss

        return measured

    def _after(self, number: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._asleep() or self._stepping is None:
            return
        self._stepping = None
        self._stepped.add(number)
        self._is_through(number)
        if len(self._stepped) == self._count:
            self.end()

    def end(self) -> None:
        """End the step of those that have stepped, if any has."""
        if self._stepped and self._stepping is None:
            stepped, self._stepped = sorted(self._stepped), set()
            self._done(stepped)

    def close(self) -> None:
        """Detach."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
