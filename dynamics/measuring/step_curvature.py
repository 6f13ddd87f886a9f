"""The curvature of a step, on the step's own batches: when it is measured, and the warnings where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from ..loop.batches import Batches
from ..loop.logged_loss import LoggedLoss
from ..loop.processes import Processes
from ..loop.seen import Seen
from ..probing.objective import Objective
from ..probing.probe import Probe
from ..warning import warn
from .all_or_none import AllOrNone
from .candidates import REFUSALS, Candidate, Candidates
from .captured_curvature import CapturedCurvature
from .probed_step import ProbedStep
from .search import Search
from .warn_once import WarnOnce

_DOUBTFUL = 0.5  # cosine of the objective's gradient with the applied one
_EXPLAINING = ("doubtful", "beside", "outside")  # kinds of warnings that say why the gradients differ


class StepCurvature:
    """Measures the curvature of steps whose number ``every`` divides (0: of none).

    At the ``first`` step it at least finds the batches, because how far a loop reads ahead shows at its start, and so
    where that may have changed. Where batches were skipped or read ahead, there are several candidates for a step's
    batches: the one is chosen whose gradient has the applied one's direction. If the objective fails, curvature ends
    with one warning; the training continues.
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
        self._all_or_none = AllOrNone(model, processes, self.stop)
        self._candidates = Candidates(model, objective, batches, processes)
        self._search = Search(probed, self._captured, processes, self._all_or_none)
        self._probes: list[Candidate] = []
        self._warn_once = WarnOnce()
        self._loss = LoggedLoss()
        self.unseen = 0  # steps at which curvature was due before any batch was seen
        if every and processes.sharded:
            self.stop()
            warn(
                "curvature is not recorded: it needs all parameters in one process, but FSDP2 shards them; set "
                "curvature_every=0 to record first-order quantities only"
            )

    def due(self, step: int) -> bool:
        """Whether a step's batches are to be found: it is recorded or the first, or how the loop reads is unclear."""
        return bool(self._every) and (step == self._first or self._records(step) or self._batches.unclear)

    def _records(self, step: int) -> bool:
        return step % self._every == 0

    @property
    def looks(self) -> bool:
        """Whether a step's batches can be found although nothing is recorded of it; replicas may not agree on it."""
        return bool(self._every) and self._candidates.sure and not self._processes.replicated

    def stop(self) -> None:
        """Stop measuring."""
        self._every, self._probes = 0, []
        if isinstance(self._captured, CapturedCurvature):
            self._captured.drop()

    @property
    def failed(self) -> bool:
        """Whether measuring failed in this process and the others do not know yet."""
        return self._all_or_none.failed

    def fail(self) -> None:
        """Stop measuring, in all processes."""
        self._all_or_none.fail()

    def begin(self, step: int) -> None:
        """Keep what the measurement needs of the moment before the step."""
        self._probes = []
        if not self.due(step):
            return
        if self._processes.may_end_apart:
            self.stop()
            self._say_apart(step)
        elif (known := self._all_or_none.measured(self._known, step, evaluates=False)) is not None:
            if self._all_or_none.all_agree(bool(known)):
                self._probes = self._all_or_none.measured(partial(self._candidates.of_step, known), step) or []
            elif self._batches.moments.lost:
                self._say_lost()
            elif known:
                self._say_known_here(step)
            elif self._batches.forgotten:
                self._say_forgotten(step)
            elif self._batches.told and not self._batches:
                self._say_unknown(step)

    def _known(self) -> list[tuple[int, list[Seen]]]:
        """The batches that the step may be of, none if none was seen; keeps what else the measurement starts from."""
        if not self._batches or self._batches.forgotten:
            return []
        self._probed.keep_outside()
        return self._candidates.known()

    def end(self, step: int) -> dict[str, Tensor] | None:
        """The quantities of ``/curvature`` after the step; None if it is not measured."""
        probes, self._probes = self._probes, []
        records = self._records(step)
        self.unseen += records and not self._batches.told
        if not (records or len(probes) > 1) or not (found := self._search.found(probes, step)):
            return None
        if (best := self._candidates.choose(found)) is None:
            if records:
                self._say_another(step) if self._candidates.refused else self._say_unknown(step)
            return None
        if self._are_others_lost(best.candidate.probe) or not records:
            return None
        values = self._all_or_none.measured(
            partial(best.by.curvature_values, best.candidate.probe, best.loss, best.grad), step
        )
        if values is None:
            return None
        self._batches.bystanders.of_objective(best.candidate.probe.others)
        objectives = [*self._processes.mean([best.loss.clone()]), best.loss, best.loss / best.candidate.probe.share]
        precise = self._batches.moments.precise
        self._loss.measured(step, best.likeness, objectives, len(best.candidate.probe), precise=precise)
        self._say_beside(best.grad)
        if not best.sure:
            self._say_outside()
        if best.cosine < _DOUBTFUL:
            self._say_doubtful(step, best.cosine)
        if values.get("approximate"):
            self._say_approximate(step)
        return self._processes.mean_values(self._probed.unless_frozen_move(best.candidate.probe, values))

    def trust_loss(self) -> None:
        """From now on, what is logged as the loss is known to be the one that is trained on."""
        self._loss.trusted = True

    def logged(self, step: int, loss: float | Tensor | None, *, checks: bool = False, last: bool = False) -> None:
        """Note what the loop logged as a step's loss, and check it if told to, or before the next measured step.

        ``last``: nothing is logged any more.
        """
        self._loss.logged(step, loss)
        if checks or self.due(step + 1):
            for what, text in self._loss.differing(step, last=last):
                if what != "unlogged" or not self._warn_once.gave(*_EXPLAINING):
                    self._warn_once(text, what)

    def _are_others_lost(self, probe: Probe) -> bool:
        """Whether a network that the objective runs beside the model has changed since, and no copy was kept."""
        moved = probe.moved_others
        if self._all_or_none.all_agree(not moved):
            return False
        self._batches.bystanders.keep(moved)
        self._warn_once(
            "a network outside the model that the objective runs changes between a forward pass and its "
            "step: curvature is measured from the next due step on, for which the parameters of that network "
            "are kept",
            "others lost",
        )
        return True

    def _say_apart(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded from step {step} on: inside DDP's join() processes end at different "
            "times, and all of them are needed to measure it; set curvature_every=0 to record first-order "
            "quantities only",
            "apart",
        )

    def _say_known_here(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, whose batches are not known in other processes: watch "
            "the loader, or observe each batch, in all processes",
            "known here",
        )

    def _say_forgotten(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, which may be of all of the more than "
            f"{self._batches.forgotten} batches that were evaluated before it, in eval mode and without "
            "gradients: so many are not kept",
            "forgotten",
        )

    def _say_lost(self) -> None:
        self._warn_once(
            "parameters of the model that are not trained change within a step: curvature is measured from "
            "the next due step on, for which they are kept",
            "lost",
        )

    def _say_beside(self, grad: Mapping[str, Tensor]) -> None:
        """Warn if the loss depends on parameters that moved although no given optimizer holds them."""
        if name := next((one for one in self._batches.moments.beside if one in grad and grad[one].any()), None):
            self._warn_once(
                f"parameters that are in no optimizer that the recorder was given, first {name!r}, change between "
                "a forward pass and its step, so curvature and loss are measured where they are at the step. "
                "Pass all optimizers that train the model, as a list",
                "beside",
            )

    def _say_outside(self) -> None:
        """Warn if tensors outside the model that the loss may use moved although no given optimizer holds them."""
        if outside := self._batches.moments.outside:
            self._warn_once(
                f"a tensor of shape {tuple(outside[0].shape)} that the objective refers to, and that is in no "
                "optimizer that the recorder was given, changes between a forward pass and its step, so curvature "
                "and loss are measured where it is at the step. Pass all optimizers that step in between, as a list",
                "outside",
            )

    def _say_doubtful(self, step: int, cosine: float) -> None:
        self._warn_once(
            f"/curvature may be of another loss or of other batches than step {step} was: the gradient of the "
            f"objective and the gradient applied have cosine {cosine:.2f} (grad_applied_grad shows it at "
            "each step). Unless the loop itself changes gradients before they are applied, or rounds to half "
            "precision, give the recorder the loop's own loss: Recorder(..., objective=lambda model, batch: "
            "<scalar loss>). If it already has that loss, something that the loss uses changed between "
            "forward pass and step: with several networks, call observe() right before the forward pass of "
            "each, and pass all optimizers that step in between",
            "doubtful",
        )

    def _say_approximate(self, step: int) -> None:
        self._warn_once(
            f"curvature is approximate from step {step} on: an operation of the model has no second "
            "derivative, so Hessian products are central differences of gradients (`approximate` is 1)",
            "approximate",
        )

    def _say_another(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, whose batch is not known: the gradient applied is that of none "
            "of the batches which the loop has read, although it was at all steps before. If the loop uses batches "
            "again while it reads others ahead, watch nothing and call recorder.observe(batch) right before each "
            "forward pass. If it changes its gradients from now on, curvature is recorded again after "
            f"{REFUSALS} such steps",
            "another",
        )

    def _say_unknown(self, step: int) -> None:
        self._warn_once(
            f"curvature is not recorded at step {step}, whose batch is not known: watch everything that the "
            "loop reads, such as itertools.cycle(loader) as a whole, or watch nothing and call "
            "recorder.observe(batch) right before each forward pass",
            "unknown",
        )
