"""Which batches a step is made of: those whose gradients are in ``.grad`` when the optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .moment import Moment


class Batches:
    """The batches seen since the last step, as far as their gradients have not been thrown away.

    Gradients accumulate over micro-batches, but that of a batch which was skipped (by ``continue``, or by a gradient
    scaler that found an infinity) is set to zero again. So the step's batches are the last m seen, where m counts the
    backward passes since the gradients were last zero. Where none is seen to arrive, all batches since the last step
    are its batches.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._seen: list[tuple[Any, Moment | None]] = []
        self._passes = [_Passes(parameter) for parameter in parameters if parameter.requires_grad]

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, batch: Any, moment: Moment | None) -> None:
        """One more batch, with the moment at which its forward pass starts."""
        self._seen.append((batch, moment))

    def of_the_step(self) -> tuple[list[Any], list[Moment | None]]:
        """The batches of the step that is about to be taken, and their moments."""
        self._choose()
        passes = self._passes[0].count if self._passes else 0
        batches, moments = zip(*self._seen[-passes:], strict=True)  # of 0 passes: all
        return list(batches), list(moments)

    def _choose(self) -> None:
        """From the first step on count at one parameter only, one that has a gradient."""
        if len(self._passes) > 1 and (counting := [passes for passes in self._passes if passes.count]):
            for passes in self._passes:
                if passes is not counting[0]:
                    passes.remove()
            self._passes = counting[:1]

    def clear(self) -> None:
        """Forget all batches: their step is taken."""
        self._seen = []

    def close(self) -> None:
        """Remove the hooks."""
        for passes in self._passes:
            passes.remove()


class _Passes:
    """Counts the backward passes that have added up in a parameter's gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.count = 0
        self._before: tuple[weakref.ref, int] | None = None
        self._hook = parameter.register_post_accumulate_grad_hook(self._arrived)
        self.remove = self._hook.remove

    def _arrived(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad.layout is not torch.strided or grad.requires_grad:
            self.count = 0  # such a gradient is a new tensor at each pass: it does not tell
            return
        gone = self._before is None or self._before[0]() is not grad or self._before[1] + 1 != grad._version
        self.count = 1 if gone else self.count + 1
        self._before = weakref.ref(grad), grad._version
