"""Checks whether the loss that a loop logs is the objective that the recorder evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_EXPLAINED = 0.99  # rounding to half precision explains a cosine between gradients that is nearer to 1
_AGREE = 0.02  # relative difference
_PARTS = 16  # a loss may be logged divided by the number of micro-batches, or as their sum, for up to so many


@dataclass
class _Doubt:
    """A step, the cosine of its gradient with the objective's, and its loss: by the objective, and as it was logged.

    Among replicas ``objectives`` holds the mean, this one's term in it, and this one's own: loops log any of them.
    """

    step: int
    cosine: float
    objectives: Tensor
    batches: int
    logged: float | Tensor | None = None


class LoggedLoss:
    """Compares the logged loss with the objective where the two may differ.

    They may at a step of several micro-batches, because loops divide what they log by their number; and at a step whose
    applied gradient is not the objective's. The loss of a step is logged after it is measured, perhaps on a GPU, where
    reading it means waiting. So it is kept, and compared just before the next measured step, which waits
    for the GPU anyway.

    Attributes:
        trusted: whether what is logged surely is the loss that is trained on. Then it is compared at every step,
            because the gradient of a multiple of the objective has the same direction, and so gives no reason to doubt.
    """

    def __init__(self) -> None:
        self.trusted = False
        self._doubts: list[_Doubt] = []

    def measured(self, step: int, cosine: float, objectives: Sequence[Tensor], batches: int) -> None:
        """Note the objective of a step on so many batches, and the cosine of its gradient with the applied one."""
        if self.trusted or cosine < _EXPLAINED or batches > 1:
            self._doubts.append(_Doubt(step, cosine, torch.stack([one.detach() for one in objectives]), batches))

    def logged(self, step: int, loss: float | Tensor | None) -> None:
        """Note what was logged as the loss of a finished step, or None."""
        for doubt in self._doubts:
            if doubt.step == step:
                doubt.logged = loss

    def differing(self, step: int) -> Iterator[tuple[str, str]]:
        """Kind and warning text of each difference at the steps up to this one, which are then forgotten.

        Only this last step is kept if its loss has not been logged yet.
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
    """Distance of the objective from what was logged or, if that is nearer, from ``batches`` times it."""
    return min(abs(objective - logged), abs(objective - batches * logged))


def _is_part_or_sum(logged: float, objective: float) -> bool:
    return any(_agree(logged, n * objective) or _agree(n * logged, objective) for n in range(1, _PARTS + 1))


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= _AGREE * max(abs(one), abs(other))
