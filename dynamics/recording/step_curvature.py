"""The curvature of a step, on the step's own batches: which they are, what it is, what to say where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import named
from ..loop.batches import Batches
from ..loop.logged_loss import LoggedLoss
from ..loop.processes import Processes
from ..loop.seen import Seen
from ..probing.batch import sample_count
from ..probing.moment import Moment
from ..probing.probe import Objective, Probe
from .captured_curvature import CapturedCurvature
from .probed_step import ProbedStep
from .warn_once import WarnOnce

_Measured = TypeVar("_Measured")
_DOUBTFUL = 0.5  # cosine of the objective's gradient with the one applied
_SURE = 1 - 1e-6
_OBJECTIVE = "Give the recorder what fits model and loader: Recorder(..., objective=lambda model, batch: <scalar loss>)"
_MEMORY = "A second derivative takes several times a step's memory: give smaller batches"


# Which moment of a batch is the step's.
_MOMENTS: dict[str, Callable[[Seen], Moment | None]] = {
    "forward pass": lambda seen: seen.moment,
    "seen": lambda seen: seen.first_moment or seen.moment,  # a loss may draw random numbers before it runs the network
    "forward pass before the gradient": lambda seen: seen.gradient_moment or seen.moment,  # of several
    "further forward pass": lambda seen: seen.last_moment or seen.moment,  # the first was not for the step's sake
}


class _Way(NamedTuple):
    """How a step may be of its batches: from which of :data:`_MOMENTS` on, counted by their samples or equally.

    And as they were seen, or as the loop had ``changed`` them in place by their forward pass.
    """

    moment: str = "forward pass"
    by_samples: bool = True
    changed: bool = False


class _Candidate(NamedTuple):
    """Batches that a step may be of, by number, in one way; if not ``certain``, only the gradient can tell."""

    number: int
    way: _Way
    probe: Probe
    certain: bool


class _Found(NamedTuple):
    """A candidate's loss and gradient in its probe, its cosine with the one applied, and the mean of the layers'."""

    by: ProbedStep | CapturedCurvature
    probe: Probe
    loss: Tensor
    grad: dict[str, Tensor]
    cosine: float
    in_layers: float

    @property
    def sure(self) -> bool:
        """Whether the gradient is the one applied, but for its length."""
        return self.cosine > _SURE


class StepCurvature:
    """Measures the curvature of every so-manieth step, 0 for none; of the ``first`` only which batches it is of.

    For how far a loop reads ahead shows when it begins. Where batches were skipped or read ahead there are several
    candidates for those that a step is of; they are the ones whose gradient points where the applied one does. Whatever
    the objective does wrong costs the curvature, with one warning, not the training.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        probed: ProbedStep,
        processes: Processes,
        first: int,
        every: int,
        *,
        capture: bool,
    ) -> None:
        self._model, self._objective, self._batches = model, objective, batches
        self._probed, self._processes, self._every, self._first = probed, processes, every, first
        self._captured = CapturedCurvature(probed) if capture and not processes.replicated else probed
        self._probes: list[_Candidate] = []
        self._way: _Way | None = None  # the likeliest, as far as a step has told
        self._warn_once = WarnOnce()
        self._loss = LoggedLoss()
        self.unseen = 0  # steps that were due, and taken, before any batch was seen
        self.failed = False  # whether measuring failed in this process, and the others are not told yet
        if every and processes.sharded:
            self.stop()
            warnings.warn(
                "curvature is not recorded: it needs all parameters in one process, and FSDP2 spreads them; "
                "give curvature_every=0 to record first-order quantities only",
                stacklevel=3,
            )

    def due(self, step: int) -> bool:
        """Whether a step is to be looked at."""
        return bool(self._every) and (step == self._first or self._records(step))

    def _records(self, step: int) -> bool:
        return step % self._every == 0

    def stop(self) -> None:
        """Measure no more."""
        self._every, self._probes = 0, []
        if isinstance(self._captured, CapturedCurvature):
            self._captured.drop()

    def fail(self) -> None:
        """Measure no more; replicas, which would wait for this one, are told when they all come together next."""
        if self._processes.replicated:
            self.failed = True
        else:
            self.stop()

    def begin(self, step: int) -> None:
        """Keep what the measurement needs of the moment before the step."""
        self._probes = []
        if not self.due(step):
            return
        if self._processes.may_end_apart:
            self.stop()
            self._warn_once(
                f"curvature is not recorded from step {step} on: inside DDP's join() processes end apart, and all of "
                "them would have to measure it; give curvature_every=0 to record first-order quantities only",
                "apart",
            )
        elif self._processes.replicated and self._or_give_up(lambda: True, step) is None:
            return
        elif self._batches:
            self._probed.keep_outside()
            self._probes = self._or_give_up(self._make_probes, step) or []
        elif self._batches.told:
            self._say_unknown(step)

    def _make_probes(self) -> list[_Candidate]:
        """Probes of what the step may be of, the likeliest first.

        The likeliest batches, at first all, are tried in all ways in which they differ, the others from the likeliest
        moment on.
        """
        if self._batches.failure is not None:
            raise RuntimeError(f"what the step starts from cannot be kept: {self._batches.failure}")
        candidates = enumerate(self._batches.candidates())
        known = [(number, seen) for number, seen in candidates if all(one.moment for one in seen)]
        if self._batches.lost:
            self._warn_once(
                "parameters of the model that are not trained move within a step: curvature is measured from the next "
                "step on that is due, when they are kept",
                "lost",
            )
            return []
        if self._processes.replicated:  # each has to try as many
            alone = self._processes.all_agree(len(known) == 1, self._device)
            likeliest = known[0][1] if known else []
            alike = self._processes.all_agree(len(_weights_that_differ(likeliest)) == 1, self._device)
            return [
                self._candidate(number, seen, _Way(by_samples=by_samples))
                for number, seen in (known[0], known[-1])[: 1 if alone else 2]
                for by_samples in ([True] if alike else [True, False])
            ]
        tried = [
            (number, seen, _Way(moment, by_samples, changed))
            for number, seen in known
            for moment in (_moments_that_differ(seen) if number == 0 or not self._way else [self._way.moment])
            for by_samples in _weights_that_differ(seen)
            for changed in ([True, False] if any(one.changed is not None for one in seen) else [False])
        ]
        tried.sort(key=lambda one: (one[0], one[2] != (self._way or _Way())))
        return [self._candidate(*one) for one in tried]

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _candidate(self, number: int, seen: list[Seen], way: _Way) -> _Candidate:
        batches = [one.changed if way.changed and one.changed is not None else one.batch for one in seen]
        moments = [_MOMENTS[way.moment](one) for one in seen]
        probe = Probe(self._model, self._objective, batches, moments=moments, by_samples=way.by_samples)
        return _Candidate(number, way, probe, all(one.certain for one in seen))

    def end(self, step: int) -> dict[str, Tensor] | None:
        """The quantities of ``/curvature`` after the step; None if it is not measured."""
        probes, self._probes = self._probes, []
        records = self._records(step)
        self.unseen += records and not self._batches.told
        best = self._best(probes, step) if records or len(probes) > 1 else None
        if best is None or self._are_others_lost(best.probe) or not records:
            return None
        values = self._or_give_up(partial(best.by.curvature_values, best.probe, best.loss, best.grad), step)
        if values is None:
            return None
        self._batches.bystanders.of_objective(best.probe.others)
        self._loss.measured(step, best.cosine, best.loss, len(best.probe))
        if best.cosine < _DOUBTFUL:
            self._warn_once(
                f"/curvature may be of another loss or of other batches than step {step} was: the objective's "
                f"gradient and the one applied have cosine {best.cosine:.2f} (grad_applied_grad tells at each step). "
                "Unless the loop itself changes gradients before they are applied, or rounds to half precision, give "
                "the recorder its own loss: Recorder(..., objective=lambda model, batch: <scalar loss>). If it has "
                "that, something that the loss uses changed between forward pass and step: with several networks, call "
                "observe() right before the forward pass of each, and give all optimizers that step meanwhile",
                "doubtful",
            )
        if values.get("approximate"):
            self._warn_once(
                f"curvature is approximate from step {step} on: an operation of the model has no second "
                "derivative, so Hessian products are central differences of gradients (`approximate` is 1)",
                "approximate",
            )
        return self._processes.mean_values(self._probed.unless_frozen_move(best.probe, values))

    def logged(self, step: int, loss: float | Tensor | None, *, last: bool = False) -> None:
        """What the loop logged as a step's loss; it is looked at when the next is measured, or in the end."""
        self._loss.logged(step, loss)
        if last or self.due(step + 1):
            for what, text in self._loss.differing(step):
                self._warn_once(text, what)

    def _are_others_lost(self, probe: Probe) -> bool:
        """Whether a network that the objective runs beside the model has stepped since, and nothing is left of it."""
        if not (moved := probe.moved_others):
            return False
        self._batches.bystanders.keep(moved)
        self._warn_once(
            "a network outside the model, which the objective runs, moves between a forward pass and its step: "
            "curvature is measured from the next step on that is due, when its parameters are kept",
            "others lost",
        )
        return True

    def _best(self, probes: list[_Candidate], step: int) -> _Found | None:
        """What the step is of: the first whose gradient surely is the one applied, else the one that is nearest."""
        found: list[_Found] = []
        by = self._captured if len(probes) == 1 else self._probed  # graphs write over what they found before
        for one in probes:
            measured = self._or_give_up(partial(by.gradient, one.probe), step)
            if measured is None:
                return None
            grad = self._probed.mean(measured[1])
            found.append(_Found(by, one.probe, measured[0], grad, *self._probed.alignment(grad)))
            if found[-1].sure:
                break
        if not found:
            return None
        best = _nearest(found, [one.number for one in probes[: len(found)]])
        if not (probes[best].certain or found[best].sure):
            self._say_unknown(step)
            return None
        self._way = probes[best].way
        self._batches.chosen(probes[best].number)
        return found[best]

    def _say_unknown(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, whose batch is not known. Watch what the loop reads, say "
            "itertools.cycle(loader) as a whole, or call recorder.observe(batch) before each step",
            "unknown",
        )

    def _or_give_up(self, measure: Callable[[], _Measured], step: int) -> _Measured | None:
        """What a probe measures; where it fails in any process, the training goes on without curvature in all."""
        measured, reason = None, "measuring failed in another process"
        try:
            measured = None if self.failed else measure()
        except Exception as error:
            advice = _MEMORY if isinstance(error, torch.OutOfMemoryError) else _OBJECTIVE
            reason = f"the objective failed on this step's batch with {named(error)}. {advice}, or curvature_every=0"
        if self._processes.all_agree(measured is not None, self._device):
            return measured
        self.stop()
        if not self.failed:  # which was said
            warnings.warn(f"curvature is not recorded from step {step} on: {reason}", stacklevel=2)
        return None


def _nearest(found: list[_Found], numbers: list[int]) -> int:
    """Which gradient the one applied is: the last if that is sure, else one that is layer by layer.

    Else that of the likeliest batches, in the way that is nearest, unless those of other ``numbers`` are twice as near:
    what clips or disturbs a gradient turns all of them away, and other batches' may happen to be the nearest then.
    """
    apart = np.nan_to_num([1 - one.cosine for one in found], nan=3.0)
    nearest = int(np.argmin(apart))
    near = [index for index, one in enumerate(apart) if one <= 2 * apart[nearest]]
    in_layers = [index for index in near if found[index].in_layers > _SURE]
    if in_layers and not found[-1].sure:
        return in_layers[0]
    likeliest = min((index for index, number in enumerate(numbers) if number == numbers[0]), key=lambda one: apart[one])
    return nearest if apart[nearest] < apart[likeliest] / 2 else likeliest


def _moments_that_differ(seen: list[Seen]) -> list[str]:
    """Of :data:`_MOMENTS` those that are not the first, each once."""
    found: dict[str, list[Moment]] = {}
    for name, of in _MOMENTS.items():
        moments = [of(one) for one in seen]
        same = all(at is one.moment or one.moment.is_as(at) for one, at in zip(seen, moments, strict=True))
        if not found or not (same or moments in found.values()):
            found[name] = moments
    return list(found)


def _weights_that_differ(seen: list[Seen]) -> list[bool]:
    """Whether batches count by their samples, and whether that is not the same for all of them."""
    return [True, False] if len({sample_count(one.batch) for one in seen}) > 1 else [True]
