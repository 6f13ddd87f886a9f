"""Checks whether the loss that a loop logs is the objective that the recorder evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

_EXPLAINED = 0.99  # rounding to half precision explains a cosine between gradients that is nearer to 1
_EQUAL = 1 - 1e-4  # that of single precision explains no more than this
_THE_SAME = 1 - 1e-6  # and seldom this: a small penalty leaves more, whose curvature may be large
_AGREE, _AGREE_PRECISELY = 0.02, 1e-4  # relative differences
_NEAR_ZERO = 1e-6  # absolute difference up to which losses in single precision agree, unless it is much of them
_MUCH = 0.001  # of a loss
_UNLIKELY = 0.9  # rounding hardly explains a cosine below this, whatever the precision
_UNLOGGED = 16  # steps in doubt, without any logged loss that could be compared
_PARTS = 16  # a loss may be logged divided by the number of micro-batches, or as their sum, for up to so many


@dataclass
class _Doubt:
    """A step, how near its gradient is to the objective's, and its loss: by the objective, and as it was logged.

    ``cosine``: of the two gradients or, if that is nearer to 1, its mean over layers, which may be clipped each alone.
    ``precise``: whether the loop computed both in single precision or better. Among replicas ``objectives`` holds the
    mean, this one's term in it, and this one's own: loops log any of them.
    """

    step: int
    cosine: float
    objectives: Tensor
    batches: int
    precise: bool
    logged: float | Tensor | None = None

    @property
    def explained(self) -> float:
        """The cosine above which rounding explains that the gradients differ, so that losses need not agree."""
        return _THE_SAME if self.precise else _EXPLAINED

    @property
    def is_unlikely(self) -> bool:
        """Whether the gradients differ by more than rounding ever explains."""
        return self.cosine < (_EQUAL if self.precise else _UNLIKELY)

    @property
    def tolerance(self) -> float:
        """Relative difference up to which two losses agree."""
        return _AGREE_PRECISELY if self.precise else _AGREE


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
        self._unlogged: list[_Doubt] = []
        self._compared = False

    def measured(self, step: int, cosine: float, objectives: Sequence[Tensor], batches: int, *, precise: bool) -> None:
        """Note the objective of a step on so many batches, and the :class:`_Doubt`'s cosine of its gradient."""
        doubt = _Doubt(step, cosine, torch.stack([one.detach() for one in objectives]), batches, precise)
        if self.trusted or cosine < doubt.explained or batches > 1:
            self._doubts.append(doubt)

    def logged(self, step: int, loss: float | Tensor | None) -> None:
        """Note what was logged as the loss of a finished step, or None."""
        for doubt in self._doubts:
            if doubt.step == step:
                doubt.logged = loss

    def differing(self, step: int, *, last: bool = False) -> Iterator[tuple[str, str]]:
        """Kind and warning text of each difference at the steps up to this one, which are then forgotten.

        Only this last step is kept if its loss has not been logged yet; ``last``: unless nothing is logged any more.
        """
        ended = step if last else step - 1
        known = [one for one in self._doubts if one.step <= step and one.logged is not None]
        lost = [one for one in self._doubts if one.step <= ended and one.logged is None]
        self._doubts = [one for one in self._doubts if one.step > (ended if one.logged is None else step)]
        self._unlogged += [one for one in lost if one.is_unlikely]
        self._compared |= bool(known)
        if self._unlogged and not self._compared and (last or len(self._unlogged) >= _UNLOGGED):
            yield "unlogged", self._ask()
        for doubt in known:
            logged, batches, near = float(doubt.logged), doubt.batches, doubt.tolerance
            objectives = doubt.objectives.tolist()
            rounded = _rounding(doubt.logged)
            if any(_agree(logged, one, near) or abs(logged - one) <= rounded for one in objectives):
                continue
            objective = min(objectives, key=lambda one: _distance(one, logged, batches))
            if batches > 1 and _agree(batches * logged, objective, _AGREE):
                yield (
                    "divided",
                    f"the loss logged at step {doubt.step}, {logged:.4g}, is 1/{batches} of the objective's, "
                    f"{objective:.4g}: log the loss before dividing it by the number of micro-batches",
                )
            elif self._is_another(doubt, logged, objective):
                half = "In half precision, with autocast for example, rounding alone may explain this. Otherwise, if"
                digits = ".6g" if doubt.precise else ".4g"
                yield (
                    "doubtful",
                    f"the loss of step {doubt.step} was logged as {logged:{digits}}, but the objective is "
                    f"{objective:{digits}} on its batch; their gradients have {_alike(doubt.cosine)}. "
                    f"{'If' if doubt.precise else half} the logged value is the loss that the loop minimises, "
                    "/curvature is of another loss: give the recorder the same one, "
                    "Recorder(..., objective=lambda model, batch: <the loss>)",
                )

    def _ask(self) -> str:
        """The warning that without a logged loss nothing tells whether it is the objective."""
        worst = min(self._unlogged, key=lambda one: one.cosine)
        return (
            f"the gradient applied at step {worst.step} and that of the objective have cosine {worst.cosine:.4f}, and "
            "at no measured step was a loss logged that would tell whether /curvature is of the loop's own: "
            "recorder.log(loss=loss) after each step has the two compared. If the loop splits, mixes or augments what "
            "it reads, call recorder.observe(batch) with what the model gets; if it smooths labels or adds a penalty, "
            "pass Recorder(..., objective=lambda model, batch: <the loss>). If it changes gradients before they are "
            "applied, all is as it should be"
        )

    def _is_another(self, doubt: _Doubt, logged: float, objective: float) -> bool:
        if self.trusted:
            return math.isfinite(logged - objective)
        return doubt.cosine < doubt.explained and not _is_part_or_sum(logged, objective, doubt.tolerance)


def _alike(cosine: float) -> str:
    if cosine > _THE_SAME:
        return "the same direction, as those of a multiple have"
    return f"cosine {cosine:.{4 if cosine < _EQUAL else 6}f}"


def _distance(objective: float, logged: float, batches: int) -> float:
    """Distance of the objective from what was logged or, if that is nearer, from ``batches`` times it."""
    return min(abs(objective - logged), abs(objective - batches * logged))


def _rounding(logged: float | Tensor) -> float:
    """By how much a logged number was rounded at most: to a decimal place, as by ``round(loss, 3)``, or in bits."""
    number = float(logged)
    exponent = Decimal(repr(number)).as_tuple().exponent
    decimal = 0.51 * 10.0**exponent if isinstance(exponent, int) else 0.0  # not a number, or infinite
    halves = [dtype for dtype in (torch.float16, torch.bfloat16) if float(torch.tensor(number).to(dtype)) == number]
    kinds = map(torch.finfo, halves)
    return max(decimal, *(max(abs(number), kind.tiny) * kind.eps for kind in kinds), 0.0)


def _is_part_or_sum(logged: float, objective: float, near: float) -> bool:
    return any(_agree(logged, n * objective, near) or _agree(n * logged, objective, near) for n in range(1, _PARTS + 1))


def _agree(one: float, other: float, near: float) -> bool:
    size = max(abs(one), abs(other))
    return abs(one - other) <= max(near * size, min(_NEAR_ZERO, _MUCH * size))
