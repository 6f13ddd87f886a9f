"""Attaches to optimizers by their own hooks, which tell when a step's gradient is ready and when the step is done."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FrameType, MethodType
from typing import Any

import torch

from ..network.optimizers import does_more
from .steps import Steps

_OF_TORCH = sys.modules[torch.optim.Optimizer.__module__].__file__


class Attachment:
    """Hooks on one optimizer, or on several that train one model; they report each step to ``steps``.

    A step is one step of each optimizer; it also ends where one of them steps again, or at :meth:`end`. A closure is
    wrapped: its gradient is ready when it first returns. A step that ends in an exception does not count, except for
    the other optimizers that had already stepped. Pre-step hooks that others add to an optimizer run before these from
    the end of the next step, or :meth:`end`, on. While ``steps`` is busy, hooks do nothing. ``given`` are the
    optimizers as the user passed them: what a wrapper does around the step of the inner one, such as Lookahead's
    averaging, is part of the step; but not what it does after it has also stepped another of these optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], given: Sequence[Any], steps: Steps) -> None:
        self._optimizers, self._steps = list(optimizers), steps
        self._stepping: int | None = None  # the optimizer whose step has begun
        self._nested = 0  # how many steps of the same optimizer are inside it: a subclass may call its parent's step
        self._stepped: set[int] = set()  # those that have stepped
        begins, done = torch.compiler.disable(self._wrapper_begins), torch.compiler.disable(self._wrapper_done)
        self._wrappers = {
            number: _Wrapper(outer, begins, partial(done, number))
            for number, (outer, one) in enumerate(zip(given, optimizers, strict=True))
            if outer is not one and does_more(outer)
        }
        before, after = torch.compiler.disable(self._before), torch.compiler.disable(self._after)
        self._pre_hooks = [one.register_step_pre_hook(partial(before, number)) for number, one in enumerate(optimizers)]
        self._hooks = self._pre_hooks + [
            one.register_step_post_hook(partial(after, number)) for number, one in enumerate(optimizers)
        ]

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def _before(
        self, number: int, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if self._steps.busy:
            return None
        if self._stepping == number and (self._is_wrapped(number) or _is_within_a_step_of(optimizer)):
            self._nested += 1
            return None
        if (outer := self._stepping) is not None and self._is_wrapped(outer) and self._wrappers[outer].within:
            self._has_stepped(outer)  # this one steps within the wrapper of another that has stepped
        if self._stepping is not None or number in self._stepped:
            self._finish(late=True)
        self._stepping = number
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if not self._stepped:
            self._steps.begin(waits=callable(closure))
        if not callable(closure):
            self._steps.take_gradient(number)
            return None
        measuring = self._measuring(closure, number)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": measuring}
        return (args[0], measuring, *args[2:]), kwargs

    def _measuring(self, closure: Callable[[], Any], number: int) -> Callable[[], Any]:
        waiting = [number]

        def measured() -> Any:
            try:
                with nullcontext() if waiting else self._steps.evaluates_again():
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
        if self._nested:
            self._nested -= 1
        elif self._is_wrapped(number):
            self._wrappers[number].within = True
        else:
            self._through(number)

    def _wrapper_begins(self) -> None:
        """The step of a wrapper begins: it may move θ before the inner optimizer steps."""
        if not (self._steps.busy or self._stepped) and self._stepping is None:
            self._steps.keep()

    def _wrapper_done(self, number: int, *, within: bool) -> None:
        """The step of a wrapper is done; ``within``: whether the inner optimizer has completed a step in it."""
        self._steps.forget()
        if within:
            self._through(number)
        elif self._stepping == number:
            self._finish()

    def _is_wrapped(self, number: int) -> bool:
        """Whether a wrapper around the optimizer is stepping right now."""
        return number in self._wrappers and self._wrappers[number].steps

    def _through(self, number: int) -> None:
        """An optimizer's step is done, if one had begun."""
        if self._stepping is None:
            return
        self._has_stepped(number)
        if len(self._stepped) == len(self._optimizers):
            self.end()

    def _has_stepped(self, number: int) -> None:
        """Count an optimizer among those that have stepped."""
        self._steps.take_update(number)  # before it counts: an interruption would end the step with an old update
        self._stepped.add(number)
        if len(self._stepped) < len(self._optimizers):
            self._steps.pause(sorted(self._stepped))
        self._stepping = None

    @property
    def under_way(self) -> list[int]:
        """The optimizers that have stepped in a step that has not ended; none while one is stepping."""
        return sorted(self._stepped) if self._stepping is None else []

    def end(self, *, alone: bool = False) -> None:
        """End the step of the optimizers that have stepped, if any; does nothing while one is stepping.

        If this process may be ``alone`` in calling it, the step ends later: all have to agree on what a step is.
        """
        if self._stepping is None:
            if not (alone and self._steps.together):
                self._finish()
            self._come_last()

    def _finish(self, *, late: bool = False) -> None:
        """End the step of the optimizers that have stepped; one that had only begun was ended by an exception."""
        self._stepping, self._nested = None, 0
        if self._stepped:
            stepped, self._stepped = sorted(self._stepped), set()
            self._steps.end(stepped, late=late)

    def _come_last(self) -> None:
        """Move the pre-step hooks behind all others, which may change the gradients."""
        for one, hook in zip(self._optimizers, self._pre_hooks, strict=True):
            hooks: Any = one._optimizer_step_pre_hooks
            if hook.id in hooks and hook.id != next(reversed(hooks)):
                hooks.move_to_end(hook.id)

    def close(self) -> None:
        """Detach."""
        self._finish()
        for hook in self._hooks:
            hook.remove()
        for wrapper in self._wrappers.values():
            wrapper.close()
        self._hooks = []


class _Wrapper:
    """Wraps the step of an optimizer that steps through another.

    ``begins()`` is called when it begins, ``done(within=...)`` when it ends or fails.

    Attributes:
        steps: whether the wrapper is stepping right now.
        within: whether the inner optimizer has stepped in that step.
    """

    def __init__(self, wrapper: Any, begins: Callable[[], None], done: Callable[..., None]) -> None:
        self.steps = self.within = False
        self._wrapper, self.is_open = wrapper, True
        self.own = vars(wrapper).get("step")  # set on the object if something else, such as a scheduler, wrapped it

        @functools.wraps(type(wrapper).step if self.own is None else self.own)
        def step(stepping: Any, *args: Any, **kwargs: Any) -> Any:
            own = self._step_without(stepping)
            if stepping is not wrapper or not self.is_open:  # a copy of it, say
                return own(*args, **kwargs)
            begins()
            self.steps, self.within = True, False
            try:
                return own(*args, **kwargs)
            finally:
                self.steps = False
                done(within=self.within)

        step.of = self  # type: ignore[attr-defined]
        self._step = vars(wrapper)["step"] = MethodType(step, wrapper)

    def _step_without(self, stepping: Any) -> Callable[..., Any]:
        """The step that the wrapper, or a copy of it, would have if this had not replaced it."""
        if self.own is None:
            return type(stepping).step.__get__(stepping)
        return MethodType(self.own.__func__, stepping) if hasattr(self.own, "__func__") else self.own

    def close(self) -> None:
        """Give the wrapper its own step back; if something else has wrapped the step since, just pass calls on."""
        self.is_open = False
        if vars(self._wrapper).get("step") is not self._step:
            return
        own = self.own
        while (of := getattr(own, "of", None)) is not None and not of.is_open:  # closed before this one
            own = of.own
        if own is None:
            del vars(self._wrapper)["step"]
        else:
            vars(self._wrapper)["step"] = own


def _is_within_a_step_of(optimizer: torch.optim.Optimizer) -> bool:
    """Whether another step of the optimizer is still running as this one begins, which the call stack shows.

    Torch wraps the step of a class and that of its parent, and both call the optimizer's hooks.
    """
    frame: FrameType | None = sys._getframe()
    running = 0
    while frame is not None and running < 2:
        of_torch = frame.f_code.co_filename == _OF_TORCH
        running += of_torch and frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return running == 2
