"""The curvature of a step, on the step's own batches: when it is measured, and what to say where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import named
from ..loop.batches import Batches
from ..loop.logged_loss import LoggedLoss
from ..loop.processes import Processes
from ..loop.seen import Seen
from ..probing.objective import Objective
from ..probing.probe import Probe
from .candidates import Candidate, Candidates, Found
from .captured_curvature import CapturedCurvature
from .probed_step import ProbedStep, shares
from .warn_once import WarnOnce

_Measured = TypeVar("_Measured")
_DOUBTFUL = 0.5  # cosine of the objective's gradient with the one applied
_OBJECTIVE = "Give the recorder what fits model and loader: Recorder(..., objective=lambda model, batch: <scalar loss>)"
_MEMORY = "A second derivative takes several times a step's memory: give smaller batches"


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
        self._model, self._batches = model, batches
        self._probed, self._processes, self._every, self._first = probed, processes, every, first
        self._captured = CapturedCurvature(probed) if capture and not processes.replicated else probed
        self._candidates = Candidates(model, objective, batches, processes)
        self._probes: list[Candidate] = []
        self._in_shares = False  # whether the last step's batches counted neither by their samples nor equally
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
        elif (known := self._or_give_up(self._known, step)) is not None:
            if self._all_agree(bool(known)):
                self._probes = self._or_give_up(partial(self._candidates.of_step, known), step) or []
            elif self._batches.moments.lost:
                self._say_lost()
            elif known:
                self._warn_once(
                    f"curvature is not recorded at step {step}, whose batches other processes do not know: watch the "
                    "loader, or observe each batch, in all of them",
                    "known here",
                )
            elif self._batches.told and not self._batches:
                self._say_unknown(step)

    def _known(self) -> list[tuple[int, list[Seen]]]:
        """Which batches the step may be of, none if none was seen; what else its measurement starts from is kept."""
        if not self._batches:
            return []
        self._probed.keep_outside()
        return self._candidates.known()

    def end(self, step: int) -> dict[str, Tensor] | None:
        """The quantities of ``/curvature`` after the step; None if it is not measured."""
        probes, self._probes = self._probes, []
        records = self._records(step)
        self.unseen += records and not self._batches.told
        best = self._best(probes, step) if records or len(probes) > 1 else None
        if best is None or self._are_others_lost(best.candidate.probe) or not records:
            return None
        values = self._or_give_up(partial(best.by.curvature_values, best.candidate.probe, best.loss, best.grad), step)
        if values is None:
            return None
        self._batches.bystanders.of_objective(best.candidate.probe.others)
        objectives = [*self._processes.mean([best.loss.clone()]), best.loss, best.loss / best.candidate.probe.share]
        self._loss.measured(step, best.cosine, objectives, len(best.candidate.probe))
        self._say_beside(best.grad)
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
        return self._processes.mean_values(self._probed.unless_frozen_move(best.candidate.probe, values))

    def trust_loss(self) -> None:
        """What is logged as the loss is surely the one that is trained on."""
        self._loss.trusted = True

    def logged(self, step: int, loss: float | Tensor | None, *, last: bool = False) -> None:
        """What the loop logged as a step's loss; it is looked at when the next is measured, or in the end."""
        self._loss.logged(step, loss)
        if last or self.due(step + 1):
            for what, text in self._loss.differing(step):
                self._warn_once(text, what)

    def _are_others_lost(self, probe: Probe) -> bool:
        """Whether a network that the objective runs beside the model has stepped since, and nothing is left of it."""
        moved = probe.moved_others
        if self._all_agree(not moved):
            return False
        self._batches.bystanders.keep(moved)
        self._warn_once(
            "a network outside the model, which the objective runs, moves between a forward pass and its step: "
            "curvature is measured from the next step on that is due, when its parameters are kept",
            "others lost",
        )
        return True

    def _best(self, probes: list[Candidate], step: int) -> Found | None:
        """What the step is of: the first whose gradient surely is the one applied, else the one that is nearest."""
        by = self._captured if len(probes) == 1 else self._probed  # graphs write over what they found before
        found: list[Found] = []
        if probes and self._in_shares and (shared := self._found_in_shares(probes[0], step)):
            found.append(shared)
        for one in () if found else probes:
            if (tried := self._found(one, by, step, others=bool(found) or one is not probes[-1])) is None:
                continue
            found.append(tried)
            if tried.sure:
                break
        if found and self._is_left_out(probes[0], found):  # then it is said why
            found = [again, *found] if (again := self._found(probes[0], by, step)) else []
        if not found:
            return None
        if not found[-1].sure:
            likeliest = [one for one in found if one.candidate.number == found[0].candidate.number]
            nearest = max(likeliest, key=lambda one: one.cosine)
            if shared := self._found_in_shares(nearest.candidate, step):
                found.append(shared)
        if (best := self._candidates.choose(found)) is None:
            self._say_unknown(step)
        return best

    def _is_left_out(self, likeliest: Candidate, found: Sequence[Found]) -> bool:
        """Whether the objective failed on the likeliest batches, and no others are surely the step's."""
        if found[-1].sure or found[0].candidate is likeliest:
            return False
        return not self._all_agree(found[0].candidate.number == likeliest.number)

    def _found(
        self, candidate: Candidate, by: ProbedStep | CapturedCurvature, step: int, *, others: bool = False
    ) -> Found | None:
        """The candidate's gradient, beside the one applied; None where the objective fails on it."""
        if (measured := self._or_give_up(partial(by.gradient, candidate.probe), step, others=others)) is None:
            return None
        grad = self._probed.mean(measured[1])
        return Found(candidate, by, measured[0], grad, *self._probed.alignment(grad))

    def _found_in_shares(self, candidate: Candidate, step: int) -> Found | None:
        """The candidate with its batches in the shares that the gradient applied has, if it surely is theirs then.

        Micro-batches may count by their tokens, say, also those of several replicas, each of which has the part of the
        loss of which the mean over replicas is the loss.
        """
        self._in_shares = False
        counts = self._processes.gathered(len(candidate.probe))
        if sum(counts) < 2:
            return None
        entries = self._or_give_up(partial(self._probed.entries, candidate.probe, sum(counts)), step)
        if entries is None:
            return None
        grads, applied = entries
        of_all = self._processes.told(shares(torch.cat(self._processes.gathered(grads), 1), applied))
        if not of_all:
            return None
        before = sum(counts[: self._processes.place])
        own = [share * len(counts) for share in of_all[before : before + len(candidate.probe)]]
        found = self._found(candidate._replace(probe=candidate.probe.in_shares(own)), self._probed, step)
        self._in_shares = found is not None and found.sure
        return found if self._in_shares else None

    def _say_lost(self) -> None:
        self._warn_once(
            "parameters of the model that are not trained move within a step: curvature is measured from the next "
            "step on that is due, when they are kept",
            "lost",
        )

    def _say_beside(self, grad: Mapping[str, Tensor]) -> None:
        """Say which parameters the loss depends on that another optimizer has moved, which was not given."""
        if name := next((one for one in self._batches.moments.beside if one in grad and grad[one].any()), None):
            self._warn_once(
                f"parameters that no optimizer holds which the recorder was given, {name!r} first, move between a "
                "forward pass and its step: curvature and loss are of where they are at the step. Give it all "
                "optimizers that train the model, as a list",
                "beside",
            )

    def _say_unknown(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, whose batch is not known. Watch what the loop reads, say "
            "itertools.cycle(loader) as a whole, or call recorder.observe(batch) before each step",
            "unknown",
        )

    def _or_give_up(self, measure: Callable[[], _Measured], step: int, *, others: bool = False) -> _Measured | None:
        """What a probe measures; where it fails in any process, the training goes on without curvature in all.

        Unless there are ``others``, of which the step may be.
        """
        measured, reason = None, "measuring failed in another process"
        try:
            measured = None if self.failed else measure()
        except Exception as error:
            advice = _MEMORY if isinstance(error, torch.OutOfMemoryError) else _OBJECTIVE
            reason = f"the objective failed on this step's batch with {named(error)}. {advice}, or curvature_every=0"
        if self._all_agree(measured is not None):
            return measured
        if others:
            return None
        self.stop()
        if not self.failed:  # which was said
            warnings.warn(f"curvature is not recorded from step {step} on: {reason}", stacklevel=2)
        return None

    def _all_agree(self, fine: bool) -> bool:
        """Whether it is fine in every process that measures."""
        return self._processes.all_agree(fine, next(self._model.parameters()).device)
