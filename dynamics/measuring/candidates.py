"""Which batches a step may be of, from which moments, and with what weights: the applied gradient decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from ..loop.batches import Batches
from ..loop.processes import Processes
from ..loop.seen import Seen
from ..probing.batch import sample_count
from ..probing.moment import Moment
from ..probing.objective import Objective
from ..probing.probe import Probe
from .captured_curvature import CapturedCurvature
from .probed_step import ProbedStep

_SURE = 1 - 1e-6  # a cosine
_UNLIKE = 1 - 1e-4  # a cosine that is unlike one that is sure
REFUSALS = 4  # steps in a row without curvature

# Which moment of a batch is the step's.
_MOMENTS: dict[str, Callable[[Seen], Moment | None]] = {
    "forward pass": lambda seen: seen.moment,
    "seen": lambda seen: seen.first_moment or seen.moment,  # a loss may draw random numbers before its forward pass
    "forward pass before the gradient": lambda seen: seen.gradient_moment or seen.moment,  # of several
    "further forward pass": lambda seen: seen.last_moment or seen.moment,  # the first was not the step's
    "next forward pass": lambda seen: seen.next_moment or seen.moment,  # batches seen before it were skipped
}


class _Way(NamedTuple):
    """How a step may use its batches: from which of :data:`_MOMENTS`, and weighted by their samples or equally.

    ``changed``: as the loop had changed them by their forward pass, not as they were seen.
    """

    moment: str = "forward pass"
    by_samples: bool = True
    changed: bool = False


class Candidate(NamedTuple):
    """A probe of the batches that a step may be of, used in one way; ``number``: the rank of these batches.

    If not ``certain``, only the gradient can tell whether the step is of them.
    """

    number: int
    way: _Way
    probe: Probe
    certain: bool


class Found(NamedTuple):
    """A candidate's loss and gradient, measured ``by`` one of two means, and how they align with the applied gradient.

    ``cosine`` is that of the two gradients, ``in_layers`` the weighted mean of the layers' cosines.
    """

    candidate: Candidate
    by: ProbedStep | CapturedCurvature
    loss: Tensor
    grad: dict[str, Tensor]
    cosine: float
    in_layers: float

    @property
    def sure(self) -> bool:
        """Whether the gradient is the applied one, up to its length."""
        return self.cosine > _SURE

    @property
    def likeness(self) -> float:
        """How near the gradient is to the applied one, as a whole or layer by layer: a cosine; NaN if not finite."""
        return max(self.cosine, self.in_layers)


class Candidates:
    """The candidates of each step; the one chosen last tells which are likely next time.

    Attributes:
        refused: of how many steps in a row, up to the last, the batches seem to be none of the candidates.
        sure: whether the gradients of all that were chosen were the applied ones, up to rounding.
    """

    def __init__(self, model: nn.Module, objective: Objective, batches: Batches, processes: Processes) -> None:
        self._model, self._objective, self._batches, self._processes = model, objective, batches, processes
        self._way: _Way | None = None  # of the candidate chosen last
        self.refused, self.sure = 0, True

    def known(self) -> list[tuple[int, list[Seen]]]:
        """The lists of batches that the next step may be of, numbered, the likeliest first.

        It is empty if the state from which the step starts is lost.

        Raises:
            RuntimeError: that state cannot be kept.
        """
        if (failure := self._batches.moments.failure) is not None:
            raise RuntimeError(f"the state from which the step starts cannot be kept: {failure}")
        candidates = enumerate(self._batches.candidates())
        if self._batches.moments.lost:
            return []
        return [(number, seen) for number, seen in candidates if all(one.moment for one in seen)]

    def of_step(self, known: list[tuple[int, list[Seen]]]) -> list[Candidate]:
        """The candidates made of these batches, the likeliest first; every process has to know some.

        The likeliest batches are tried in all ways that make a difference, the others from the likeliest moment only;
        before a first choice, all are tried in all ways.
        """
        if self._processes.replicated:
            return self._of_replicas(known)
        tried = [
            (number, seen, _Way(moment, by_samples, changed))
            for number, seen in known
            for moment in (_moments_that_differ(seen) if number == 0 or not self._way else [self._way.moment])
            for by_samples in _weights_that_differ(seen)
            for changed in _changes_that_differ(seen)
        ]
        tried.sort(key=lambda one: (one[0], self._is_unlikely(one[2])))
        return [self._candidate(*one) for one in tried]

    def _is_unlikely(self, way: _Way) -> tuple[bool, bool]:
        """Sort key: whether a way differs from the likeliest in moment or weights, and whether in ``changed``.

        At first ``changed`` is taken to be likely, because a loop that changes a batch usually trains on the result.
        """
        likely = self._way or _Way(changed=True)
        return way._replace(changed=likely.changed) != likely, way.changed != likely.changed

    def _of_replicas(self, known: list[tuple[int, list[Seen]]]) -> list[Candidate]:
        """Candidates of replicas, which measure together and so need equally many: the likeliest and the last batches.

        They are tried in all ways that make a difference in any process.
        """
        (_, likeliest), *others = known
        ends = known[0], known[-1]
        surely = [_is_certain(seen) for _, seen in ends]
        differing = _moments_that_differ(likeliest), _weights_that_differ(likeliest), _changes_that_differ(likeliest)
        found = self._processes.gathered((bool(others), *differing, surely))
        several, moments, weights, changes, certain = zip(*found, strict=True)
        ways = [
            _Way(moment, by_samples, changed)
            for moment in (name for name in _MOMENTS if any(name in names for names in moments))
            for by_samples in max(weights, key=len)
            for changed in max(changes, key=len)
        ]
        tried = list(zip(ends, zip(*certain, strict=True), strict=True))[: 1 + any(several)]
        return [
            self._candidate(number, seen, way)._replace(certain=all(in_each))
            for (number, seen), in_each in tried
            for way in sorted(ways, key=self._is_unlikely)
        ]

    def _candidate(self, number: int, seen: list[Seen], way: _Way) -> Candidate:
        batches = [one.changed if way.changed and one.changed is not None else one.batch for one in seen]
        moments = [_MOMENTS[way.moment](one) for one in seen]
        probe = Probe(self._model, self._objective, batches, moments=moments, by_samples=way.by_samples)
        return Candidate(number, way, probe, _is_certain(seen))

    def choose(self, found: Sequence[Found]) -> Found | None:
        """The candidate that the step is of: the last if surely right, else the nearest; None if that is doubtful.

        It is if other batches might be the step's, and all that were chosen before were surely right; but after
        several such steps in a row, the loop is taken to change its gradients now.
        """
        best = _nearest(found)
        if not (best.candidate.certain or best.sure):
            return None
        if self._is_another(best):
            self.refused += 1
            self._batches.none_known()
            return None
        self.refused, self.sure = 0, self.sure and not best.likeness < _UNLIKE
        self._way = best.candidate.way
        self._batches.chosen(best.candidate.number, best.candidate.probe.shares)
        return best

    def _is_another(self, best: Found) -> bool:
        """Whether a loop that reads ahead, whose gradients were all known, has taken batches that are not known.

        Replicas would have to agree on that.
        """
        if not (self._way and self.sure) or self.refused == REFUSALS or self._processes.replicated:
            return False
        return self._batches.reads_ahead and best.likeness < _UNLIKE


def _nearest(found: Sequence[Found]) -> Found:
    """The candidate whose gradient is nearest to the applied one.

    That is the last if it is sure; else one that is sure layer by layer, among those about as near as the nearest; else
    the likeliest batches, in their nearest way, unless other batches are twice as near. The last rule is there because
    clipping or noise turns the applied gradient away from all of them, and other batches may then be nearest by chance.
    """
    apart = np.nan_to_num([1 - one.cosine for one in found], nan=3.0)
    nearest = int(np.argmin(apart))
    near = [one for one, distance in zip(found, apart, strict=True) if distance <= 2 * apart[nearest]]
    in_layers = [one for one in near if one.in_layers > _SURE]
    if in_layers and not found[-1].sure:
        return in_layers[0]
    numbers = [one.candidate.number for one in found]
    likeliest = min((index for index, number in enumerate(numbers) if number == numbers[0]), key=lambda one: apart[one])
    return found[nearest if apart[nearest] < apart[likeliest] / 2 else likeliest]


def _moments_that_differ(seen: list[Seen]) -> list[str]:
    """The names in :data:`_MOMENTS` that give different moments, each moment once; the first is always among them."""
    found: dict[str, list[Moment]] = {}
    for name, of in _MOMENTS.items():
        moments = [of(one) for one in seen]
        same = all(at is one.moment or one.moment.is_as(at) for one, at in zip(seen, moments, strict=True))
        if not found or not (same or moments in found.values()):
            found[name] = moments
    return list(found)


def _is_certain(seen: list[Seen]) -> bool:
    return all(one.certain for one in seen)


def _weights_that_differ(seen: list[Seen]) -> list[bool]:
    """The values of ``by_samples`` to try: only True if all batches have the same number of samples."""
    return [True, False] if len({sample_count(one.batch) for one in seen}) > 1 else [True]


def _changes_that_differ(seen: list[Seen]) -> list[bool]:
    """The values of ``changed`` to try: only False if the loop has changed no batch by its forward pass."""
    return [True, False] if any(one.changed is not None for one in seen) else [False]
