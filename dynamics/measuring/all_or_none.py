"""Measurements that fail if the user's objective fails: they are taken in all processes, or in none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ..errors import named
from ..loop.processes import Processes
from ..warning import warn

_Measured = TypeVar("_Measured")
_OBJECTIVE = (
    "Give the recorder an objective that fits model and loader, Recorder(..., objective=lambda "
    "model, batch: <scalar loss>)"
)
_ADVICE = {  # by what torch's error says
    "backward through the graph a second time": "If the objective calls backward(), leave that and step() to the loop",
    "can't optimize a non-leaf Tensor": "The objective cannot make an optimizer of the model's parameters: let it take "
    "inner steps itself, with torch.autograd.grad and torch.func.functional_call",
}
_MEMORY = "A second derivative takes several times the memory of a step: use smaller batches"


class AllOrNone:
    """Takes measurements as long as none fails; if one does, it calls ``stop`` in all processes, with one warning.

    Attributes:
        failed: whether measuring failed in this process and the others do not know yet.
    """

    def __init__(self, model: nn.Module, processes: Processes, stop: Callable[[], None]) -> None:
        self._model, self._processes, self._stop = model, processes, stop
        self.failed = False

    def fail(self) -> None:
        """Stop measuring; replicas, which would wait for this one, are told when they next meet."""
        if self._processes.replicated:
            self.failed = True
        else:
            self._stop()

    def measured(
        self, measure: Callable[[], _Measured], step: int, *, others: bool = False, evaluates: bool = True
    ) -> _Measured | None:
        """The result of ``measure``; None if it fails in any process, and then all stop measuring curvature.

        If there are ``others``, candidates still to try, a failure does not stop them. ``evaluates``: whether the
        objective is run.
        """
        measured, reason = None, "measuring failed in another process"
        try:
            measured = None if self.failed else measure()
        except Exception as error:
            failed = f"measuring failed with {named(error)}"
            if evaluates:
                advice = next((advice for text, advice in _ADVICE.items() if text in str(error)), _OBJECTIVE)
                advice = _MEMORY if isinstance(error, torch.OutOfMemoryError) else advice
                failed = f"the objective failed on this step's batch with {named(error)}. {advice}"
            reason = f"{failed}, or set curvature_every=0"
        if self.all_agree(measured is not None):
            return measured
        if others:
            return None
        self._stop()
        if not self.failed:  # else the user was warned already
            warn(f"curvature is not recorded from step {step} on: {reason}")
        return None

    def all_agree(self, fine: bool) -> bool:
        """Whether ``fine`` is true in every process that measures."""
        return self._processes.all_agree(fine, next(self._model.parameters()).device)
