"""Attaches to optimizers by their own hooks: says when a step's gradient is there, and when the step is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .steps import Steps


class Attachment:
    """Hooks on one optimizer or on several that train one model, which tell ``steps`` of each step.

    A step is one step of each optimizer; it also ends where one of them steps again, or at :meth:`end`. A closure is
    wrapped: its gradient is there when it first returns. A step that an exception ends is none, but for those of other
    optimizers that were through. Other hooks on an optimizer come before these, from the next step or :meth:`end` on.
    While ``steps`` is busy, hooks do nothing.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], steps: Steps) -> None:
        self._optimizers, self._steps = list(optimizers), steps
        self._stepping: int | None = None  # the optimizer whose step has begun
        self._stepped: set[int] = set()  # those that are through
        self._pre_hooks = [
            one.register_step_pre_hook(partial(self._before, number)) for number, one in enumerate(optimizers)
        ]
        self._hooks = self._pre_hooks + [
            one.register_step_post_hook(partial(self._after, number)) for number, one in enumerate(optimizers)
        ]

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def _before(
        self, number: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if self._steps.busy:
            return None
        if self._stepping is not None or number in self._stepped:
            self._finish()
        self._stepping = number
        if not self._stepped:
            self._steps.begin()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._steps.take_gradient(number)
            return None
        measuring = self._measuring(closure, number)
        return (args, {**kwargs, "closure": measuring}) if "closure" in kwargs else ((args[0], measuring), kwargs)

    def _measuring(self, closure: Callable[[], Any], number: int) -> Callable[[], Any]:
        waiting = [number]

        def measured() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._finish()
                raise
            if waiting:
                self._steps.take_gradient(waiting.pop())
            return loss

        return measured

    def _after(self, number: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._steps.busy or self._stepping is None:
            return
        self._stepping = None
        self._stepped.add(number)
        self._steps.take_update(number)
        if len(self._stepped) == len(self._optimizers):
            self.end()

    def end(self) -> None:
        """End the step of those that have stepped, if any has; not inside a step."""
        if self._stepping is None:
            self._finish()
            self._come_last()

    def _finish(self) -> None:
        """End the step of those that are through. One that has begun was ended by an exception."""
        self._stepping = None
        if self._stepped:
            stepped, self._stepped = sorted(self._stepped), set()
            self._steps.end(stepped)

    def _come_last(self) -> None:
        """Take gradients when all other hooks are through: they may change them."""
        for one, hook in zip(self._optimizers, self._pre_hooks, strict=True):
            hooks = one._optimizer_step_pre_hooks
            if hook.id in hooks and hook.id != next(reversed(hooks)):
                hooks.move_to_end(hook.id)

    def close(self) -> None:
        """Detach."""
        self._finish()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
