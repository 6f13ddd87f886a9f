"""Whether the loss that a loop logs is the objective that the recorder evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EXPLAINED = 0.99  # a cosine of gradients that is nearer to 1 may come of rounding to half precision
_AGREE = 0.02
_PARTS = 16  # a loss may be logged as its part in so many micro-batches, or as their sum


@dataclass
class _Doubt:
    """A step, the cosine of its gradient with the objective's, and its loss: by the objective, and as it was logged.

    Among replicas the objective is their mean, this one's part of that, or this one's own: loops log any of them.
    """

    step: int
    cosine: float
    objectives: Tensor
    batches: int
    logged: float | Tensor | None = None


class LoggedLoss:
    """Compares the two at steps of several micro-batches, by whose number a loop may have divided what it logs.

    And at steps where the applied gradient differs from the objective's too. What is logged comes later, and reading
    it from a GPU would mean waiting: it is read when that costs nothing.

    Attributes:
        trusted: whether it surely is the loss that is trained on. Then it is compared at every step, for one of which
            the objective is a part or a multiple has a gradient that points alike.
    """

    def __init__(self) -> None:
        self.trusted = False
        self._doubts: list[_Doubt] = []

    def measured(self, step: int, cosine: float, objectives: Sequence[Tensor], batches: int) -> None:
        """The objective of a step on so many batches, and the cosine of its gradient with the one applied."""
        if self.trusted or cosine < _EXPLAINED or batches > 1:
            self._doubts.append(_Doubt(step, cosine, torch.stack([one.detach() for one in objectives]), batches))

    def logged(self, step: int, loss: float | Tensor | None) -> None:
        """What was logged as the loss of a step that is done, or None."""
        for doubt in self._doubts:
            if doubt.step == step:
                doubt.logged = loss

    def differing(self, step: int) -> Iterator[tuple[str, str]]:
        """Differences at the steps up to this one, with the texts of their warnings; then the steps are forgotten.

        The loss of the last one may still be logged.
        """
        known = [one for one in self._doubts if one.step <= step and one.logged is not None]
        self._doubts = [one for one in self._doubts if one.step > step or (one.step == step and one.logged is None)]
        for doubt in known:
            logged, batches = float(doubt.logged), doubt.batches
            objectives = doubt.objectives.tolist()
            if any(_agree(logged, one) for one in objectives):
                continue
            objective = min(objectives, key=lambda one: _distance(one, logged, batches))
            if _agree(batches * logged, objective):
                yield (
                    "divided",
                    f"the loss logged at step {doubt.step}, {logged:.4g}, is 1/{batches} of the objective's, "
                    f"{objective:.4g}: log the loss before dividing it by the number of micro-batches",
                )
            elif self._is_another(doubt.cosine, logged, objective):
                yield (
                    "doubtful",
                    f"the loss of step {doubt.step} was logged as {logged:.4g}, but the objective is {objective:.4g} "
                    f"on its batch; their gradients have cosine {doubt.cosine:.3f}. In half precision, with autocast "
                    "for example, rounding alone may explain this. Otherwise, if the logged value is the loss that "
                    "the loop minimises, /curvature is of another loss: give the recorder the same one, "
                    "Recorder(..., objective=lambda model, batch: <the loss>)",
                )

    def _is_another(self, cosine: float, logged: float, objective: float) -> bool:
        if self.trusted:
            return math.isfinite(logged - objective) and not _agree(logged, objective)
        return cosine < _EXPLAINED and not _is_part_or_sum(logged, objective)


def _distance(objective: float, logged: float, batches: int) -> float:
    """From what was logged, or from so many times that."""
    return min(abs(objective - logged), abs(objective - batches * logged))


def _is_part_or_sum(logged: float, objective: float) -> bool:
    return any(_agree(logged, n * objective) or _agree(n * logged, objective) for n in range(1, _PARTS + 1))


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= _AGREE * max(abs(one), abs(other))
