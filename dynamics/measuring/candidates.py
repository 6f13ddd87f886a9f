"""Which batches a step may be of, from which moments, in what proportions: the applied gradient decides."""

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

# Which moment of a batch is the step's.
_MOMENTS: dict[str, Callable[[Seen], Moment | None]] = {
    "forward pass": lambda seen: seen.moment,
    "seen": lambda seen: seen.first_moment or seen.moment,  # a loss may draw random numbers before it runs the network
    "forward pass before the gradient": lambda seen: seen.gradient_moment or seen.moment,  # of several
    "further forward pass": lambda seen: seen.last_moment or seen.moment,  # the first was not for the step's sake
    "next forward pass": lambda seen: seen.next_moment or seen.moment,  # what was seen before it was skipped
}


class _Way(NamedTuple):
    """How a step may use its batches: from which of :data:`_MOMENTS` on, weighted by their samples or equally.

    And as they were seen, or as the loop had ``changed`` them by their forward pass.
    """

    moment: str = "forward pass"
    by_samples: bool = True
    changed: bool = False


class Candidate(NamedTuple):
    """Batches that a step may be of, by number, in one way; if not ``certain``, only the gradient can tell."""

    number: int
    way: _Way
    probe: Probe
    certain: bool


class Found(NamedTuple):
    """A candidate's loss and gradient in its probe, its cosine with the one applied, and the mean of the layers'."""

    candidate: Candidate
    by: ProbedStep | CapturedCurvature
    loss: Tensor
    grad: dict[str, Tensor]
    cosine: float
    in_layers: float

    @property
    def sure(self) -> bool:
        """Whether the gradient is the one applied, except for its length."""
        return self.cosine > _SURE


class Candidates:
    """The candidates of each step; how it was last chosen among them tells which are likely."""

    def __init__(self, model: nn.Module, objective: Objective, batches: Batches, processes: Processes) -> None:
        self._model, self._objective, self._batches, self._processes = model, objective, batches, processes
        self._way: _Way | None = None  # the likeliest, as far as a step has told

    def known(self) -> list[tuple[int, list[Seen]]]:
        """Which batches the next step may be of, by number, the likeliest first.

        None if the state it starts from is lost.

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
        """Of these batches, of which there are some in each of the processes, the candidates, the likeliest first.

        The likeliest batches, at first all, are tried in all ways in which they differ, the others from the likeliest
        moment on.
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
        """In its batches' moment or count, or in how they are: what a loop has changed it seldom means otherwise."""
        likely = self._way or _Way(changed=True)
        return way._replace(changed=likely.changed) != likely, way.changed != likely.changed

    def _of_replicas(self, known: list[tuple[int, list[Seen]]]) -> list[Candidate]:
        """As many in each of the processes, which measure together: in all ways in which they differ in any."""
        (_, likeliest), *others = known
        ends = known[0], known[-1]
        certain = [_is_certain(seen) for _, seen in ends]
        differing = _moments_that_differ(likeliest), _weights_that_differ(likeliest), _changes_that_differ(likeliest)
        found = self._processes.gathered((bool(others), *differing, certain))
        several, moments, weights, changes, certain = zip(*found, strict=True)
        ways = [
            _Way(moment, by_samples, changed)
            for moment in (name for name in _MOMENTS if any(name in names for names in moments))
            for by_samples in max(weights, key=len)
            for changed in max(changes, key=len)
        ]
        return [
            self._candidate(number, seen, way)._replace(certain=all(in_each))
            for (number, seen), *in_each in list(zip(ends, *certain, strict=True))[: 1 + any(several)]
            for way in sorted(ways, key=self._is_unlikely)
        ]

    def _candidate(self, number: int, seen: list[Seen], way: _Way) -> Candidate:
        batches = [one.changed if way.changed and one.changed is not None else one.batch for one in seen]
        moments = [_MOMENTS[way.moment](one) for one in seen]
        probe = Probe(self._model, self._objective, batches, moments=moments, by_samples=way.by_samples)
        return Candidate(number, way, probe, _is_certain(seen))

    def choose(self, found: Sequence[Found]) -> Found | None:
        """The candidate that the step is of: the last if surely right, else the nearest; None if none can tell."""
        best = _nearest(found)
        if not (best.candidate.certain or best.sure):
            return None
        self._way = best.candidate.way
        self._batches.chosen(best.candidate.number)
        return best


def _nearest(found: Sequence[Found]) -> Found:
    """Whose gradient the one applied is: the last's if that is sure, else that of one that is layer by layer.

    Else that of the likeliest batches, in the way that is nearest, unless those of other numbers are twice as near:
    what clips or disturbs a gradient turns all of them away, and other batches' may happen to be the nearest then.
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
    """Of :data:`_MOMENTS` those that are not the first, each once."""
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
    """Whether batches count by their samples, and whether that is not the same for all of them."""
    return [True, False] if len({sample_count(one.batch) for one in seen}) > 1 else [True]


def _changes_that_differ(seen: list[Seen]) -> list[bool]:
    """Whether batches are as the loop had changed them by their forward pass, and whether it had."""
    return [True, False] if any(one.changed is not None for one in seen) else [False]
