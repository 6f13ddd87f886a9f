"""Batches that are too many to be kept until a step: those that a loop evaluates, and those that lead to no step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..warning import warn
from .backward_passes import BackwardPasses
from .forward_passes import trains
from .seen import Seen

_MOST = 4096  # batches of one step
_IDLE = 128  # batches in a row that lead to no step, or are evaluated
_SKIPPED = 16  # batches between two steps whose gradients were discarded: a loop may skip so many


class TooMany:
    """Lets batches go. If the model is ``compiled``, its forward passes are not seen."""

    def __init__(self, model: nn.Module, *, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._last: Seen | None = None  # the last of many batches that were evaluated; the others were let go
        self._warned = self._stepped = False  # whether a warning was given, and a step taken
        self._version: int | None = None  # of a parameter, when the first batch since the last step came
        self._moved = False  # whether it has changed since, though no step was taken

    def remaining(self, seen: list[Seen], backward: BackwardPasses, ahead: int) -> list[Seen]:
        """Those batches that are kept when a further one comes; a loop reads ``ahead`` so many."""
        self._look_whether_it_moves()
        without = len(seen) - ahead - backward.count
        if self._are_evaluated(seen[: -_IDLE - 1 : -1]):
            self._last = seen[-1]
            return [*seen[:-_IDLE], seen[-1]]
        if not ((without == _IDLE and backward.count) or len(seen) == _MOST):
            return seen
        if not (self._warned or self._is_evaluated(seen[-1], idle=not backward.pending)):
            self._warned = True
            warn(
                f"more than {_IDLE} batches in a row led to no optimizer step: check that the recorder was given "
                "the model that is trained, and the optimizer that trains it"
            )
        return seen[-1:]

    def _are_evaluated(self, latest: Sequence[Seen]) -> bool:
        """Whether so many batches in a row were evaluated that they are not kept."""
        return len(latest) == _IDLE and all(one.is_evaluated for one in latest) and not trains(self._model)

    def _is_evaluated(self, last: Seen, *, idle: bool) -> bool:
        """Whether the loop evaluates the batches that it reads now, as far as is known."""
        return last.is_evaluated or (idle and (last.ran or self.may_run_unseen))

    @property
    def may_run_unseen(self) -> bool:
        """Whether the model is compiled, so that its passes are not seen, and in eval mode."""
        return self._compiled and not trains(self._model)

    def forgotten(self, seen: Sequence[Seen], used: Sequence[int]) -> int:
        """How many evaluated batches were too many to be kept, if the step may be of them; else 0."""
        if self._last is None or self._last not in seen:
            return 0
        first = seen[used[0] - 1 if used else -1]
        return _IDLE if first.evaluated or not first.with_gradients else 0

    def _look_whether_it_moves(self) -> None:
        version = next((one._version for one in self._model.parameters() if one.requires_grad), None)
        self._moved |= self._version is not None and version != self._version
        self._version = version

    def step(self, seen: Sequence[Seen], wasted: int) -> None:
        """A step is taken, of some of the batches seen; so many backward passes before it led to none."""
        missed = min(len(seen), wasted)
        if self._stepped and self._moved and missed > _SKIPPED and not self._warned:
            self._warned = True
            warn(
                f"{missed} batches and backward passes in a row led to no optimizer step, but parameters changed: if "
                "another optimizer steps in between, pass all of them from the start, Recorder(..., [first, second])"
            )
        self._stepped, self._version, self._moved = True, None, False

    def clear(self) -> None:
        """The batches are forgotten."""
        self._last = None
