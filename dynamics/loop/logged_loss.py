"""Whether the loss that a loop logs is the objective that the recorder evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_EXPLAINED = 0.99  # a cosine of gradients that is nearer to 1 may come of rounding to half precision
_AGREE = 0.02
_PARTS = 16  # a loss may be logged as its part in so many micro-batches, or as their sum


@dataclass
class _Doubt:
    """A step whose gradient is not the objective's, and its loss: by the objective, and as it was logged."""

    step: int
    cosine: float
    objective: Tensor
    logged: float | Tensor | None = None


class LoggedLoss:
    """Compares both at steps where the gradient that was applied is not the objective's either.

    What is logged comes later, and on a GPU would have to be waited for: it is looked at when it may be.
    """

    def __init__(self) -> None:
        self._doubts: list[_Doubt] = []

    def measured(self, step: int, cosine: float, objective: Tensor) -> None:
        """The objective of a step, and the cosine of its gradient with the one applied."""
        if cosine < _EXPLAINED:
            self._doubts.append(_Doubt(step, cosine, objective.detach().clone()))

    def logged(self, step: int, loss: float | Tensor | None) -> None:
        """What was logged as the loss of a step that is done, or None."""
        for doubt in self._doubts:
            if doubt.step == step:
                doubt.logged = loss

    def differing(self, step: int) -> Iterator[str]:
        """Of the steps up to this one, what is to be said where they differ; then they are forgotten."""
        known, self._doubts = self._doubts, [doubt for doubt in self._doubts if doubt.step > step]
        for doubt in (one for one in known if one.step <= step and one.logged is not None):
            logged, objective = float(doubt.logged), float(doubt.objective)
            if not any(_agree(logged, n * objective) or _agree(n * logged, objective) for n in range(1, _PARTS + 1)):
                yield (
                    f"the loss of step {doubt.step} was logged as {logged:.4g}, and the objective is {objective:.4g} "
                    f"on its batch; the gradients have cosine {doubt.cosine:.3f}. If it was the loop's loss that was "
                    "logged, /curvature is of another: give the recorder the same, Recorder(..., objective=lambda "
                    "model, batch: <the loss>)"
                )


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= _AGREE * max(abs(one), abs(other))
