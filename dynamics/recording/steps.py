"""The steps of a training as they are recorded: when to measure around each, and what its row contains."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import named
from ..loop.batches import Batches
from ..loop.groups import Group, Groups
from ..measuring.step import Measurement
from ..measuring.step_curvature import StepCurvature
from ..record.columns import Row
from ..warning import warn
from .epochs import Epochs
from .resume_points import ResumePoint, ResumePoints
from .resuming import Place
from .rows import Rows

_FIRST_ORDER = "first-order quantities"


class _OfThread(threading.local):
    """``measuring``: how many recorders are evaluating a model in this thread right now."""

    measuring = 0


_of_thread = _OfThread()


def anyone_measures() -> bool:
    """Whether any recorder is evaluating a model in this thread right now."""
    return _of_thread.measuring > 0


class Steps:
    """Measures steps, and sends the row of every ``every``-th one; ``number`` is that of the next step.

    Args:
        groups, measurement, curvature, batches: those of the training.
        asleep: a context without the hooks that the optimizers have put on the model, as K-FAC does.
        rows: where the rows go.
        epochs: counts the epochs.
        place: where in the record the training begins.
        resume_points: keeps what a training needs that resumes.
        names: quantities of ``/steps`` that a row has.
        every: record at every such step.
    """

    def __init__(
        self,
        groups: Groups,
        measurement: Measurement,
        curvature: StepCurvature,
        batches: Batches,
        asleep: Callable[[], AbstractContextManager],
        rows: Rows,
        epochs: Epochs,
        place: Place,
        resume_points: ResumePoints,
        names: Sequence[str],
        every: int,
    ) -> None:
        self._groups, self._measurement, self._curvature, self._batches = groups, measurement, curvature, batches
        self._asleep, self._rows, self._epochs, self._names, self._every = asleep, rows, epochs, names, every
        self.number, self._first, self._resume_points = place.step, place.step, resume_points
        self._flow_time: float | Tensor = place.flow_time
        self.busy = self._kept = self._begun = self._waits = self._evaluates_again = False
        self._skips: dict[int, Tensor] = {}
        self._so_far: tuple[list[int], Row | None] = [], None  # optimizers that have stepped, and their row
        self._await_forward()

    @property
    def taken(self) -> int:
        """How many steps were taken since recording began, or was resumed."""
        return self.number - self._first

    def see(self, batch: Any, *, stays: bool, source: Any) -> None:
        """A batch of the next step was seen; one that ``stays`` serves further steps, too. ``source``: its pass."""
        if self._evaluates_again:
            return
        self._batches.add(batch, due=self._curvature.due(self.number), stays=stays, source=source)
        self._rows.logged.batch(first=len(self._batches) == 1, watched=source is not None)

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a scalar for a row."""
        if not self._evaluates_again:
            self._rows.logged.add(name, value, self._batches.position)

    def keep(self) -> None:
        """Keep θ as it is before something moves it that is a part of the step about to begin."""
        if self._measures():
            with self._or_stop(_FIRST_ORDER), self._busy():
                self._measurement.begin()
                self._kept = True

    def forget(self) -> None:
        """Forget the θ that was kept: its step has ended, or never began."""
        self._kept = False

    def begin(self, *, waits: bool) -> None:
        """Keep θ as it is before the step, and what the curvature needs of this moment.

        If a closure computes the gradient (``waits``), it may read batches itself, so that the curvature's part is kept
        only when the closure returns.
        """
        self._epochs.step()
        self._batches.repeat(due=self._curvature.due(self.number))
        self._begun, self._skips, self._waits = self._measures(), {}, waits
        if self._begun and not self._kept:
            with self._or_stop(_FIRST_ORDER), self._busy():
                self._measurement.begin()
        if not waits:
            self._begin_curvature()

    def _begin_curvature(self) -> None:
        """Begin even if measuring failed in this process, because the others wait to hear of it."""
        if self._curvature.due(self.number):
            with self._or_stop("curvature"), self._busy():
                self._curvature.begin(self.number)

    def take_gradient(self, number: int) -> None:
        """Keep g before an optimizer applies it, because the step may overwrite it."""
        self._groups.note_settings(number)
        if self._begun:
            with self._or_stop(_FIRST_ORDER), self._busy():
                self._measurement.take_gradient(number)
        if self._waits:
            self._waits = False
            self._begin_curvature()

    @contextmanager
    def evaluates_again(self) -> Iterator[None]:
        """A closure computes the gradient once more, at other parameters than those that the step began from.

        The batches of the step are those that were read when it first did, and its loss is what was logged then.
        """
        self._evaluates_again = True
        try:
            yield
        finally:
            self._evaluates_again = False

    def take_update(self, number: int) -> None:
        """Take an optimizer's Δθ before anything else changes θ."""
        if (skips := self._groups.skips(number)) is not None:
            self._skips[number], self._rows.gradients.scaled = skips, True
        if self._begun:
            with self._or_stop(_FIRST_ORDER), self._busy():
                self._measurement.take_update(number)

    @property
    def together(self) -> bool:
        """Whether several processes train together; then one alone must not end a step, which all measure."""
        return self._measurement.together

    def part(self) -> None:
        """Measure nothing together with other processes from now on: these may have ended."""
        if self._measurement.sharded:
            self._every, self._begun = 0, False
        if self.together:
            self._curvature.stop()

    def pause(self, stepped: list[int]) -> None:
        """Some of several optimizers have stepped: next may be the others, or one of these again.

        If measuring takes all processes (sharded parameters), the row so far is measured now, while all of them are
        here, because one process may flush alone later.
        """
        self._rows.logged.pause(self._batches.position)
        self._so_far = (stepped, self._measured(stepped)) if self._measurement.sharded else ([], None)

    def end(self, stepped: list[int], *, late: bool = False) -> None:
        """All optimizers have stepped or, if ``late``, a new step is beginning: measure what the step did."""
        row = self._row(stepped)
        if self._curvature.due(self.number):
            with self._or_stop("curvature"), self.measuring():
                if (curvature := self._curvature.end(self.number)) is not None:
                    self._rows.add("curvature", {"step": self.number, **curvature})
        self._flow_time = self._flow_time_after(stepped)
        self._begun, self._so_far = False, ([], None)
        logged = self._rows.step(row, self._batches.position_of_step, late=late)
        self._curvature.logged(self.number - 1, logged.get("loss"))
        self.number += 1
        self._batches.step(looks=self._curvature.looks)
        self._await_forward()

    def _row(self, stepped: list[int]) -> Row | None:
        """The row of the step under way, in which these optimizers have stepped; None if it is not recorded."""
        known, row = self._so_far
        if known != stepped:
            row = self._measured(stepped)
        return row

    def _measured(self, stepped: list[int]) -> Row | None:
        if self._begun:
            with self._or_stop(_FIRST_ORDER), self._busy():
                self._measurement.end(stepped)
                if self._records():
                    trained = self._groups.trained(stepped)
                    return self._scalars(trained, stepped) | self._measurement.step_values(trained)
        return None

    def _flow_time_after(self, stepped: list[int]) -> float | Tensor:
        if 0 not in stepped:
            return self._flow_time
        return self._flow_time + self._groups.first_flow_step() * (1 - self._skips.get(0, 0.0))

    def finish(self, under_way: list[int] | None = None, *, ends: bool = False, fails: bool = False) -> None:
        """Send the last step's row with what was logged for it so far; ``ends``: the training ends here, or ``fails``.

        The row of a step that is ``under_way``, in which only these optimizers have stepped, is sent as it is now, and
        completed when the step has ended.
        """
        number, flow_time = self.number, self._flow_time
        if under_way and not self.busy:
            if (row := self._row(under_way)) is not None:
                with self._busy():  # a signal handler that flushes must not send it before the last step's row
                    self._rows.so_far(row, self._batches.position_of_step)
            number, flow_time = number + 1, self._flow_time_after(under_way)
        if number:
            time = float(flow_time) if "flow_time" in self._names else float("nan")
            self._resume_points.keep(number, ResumePoint(time, self._epochs.within(number, fails=fails)))
        loss = self._rows.finish(ends=ends).get("loss")
        self._curvature.logged(self.number - 1, loss, checks=True, last=ends and not fails)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, the model may be evaluated: only probes build graphs, and no optimizer's hook collects statistics.

        Autograd's anomaly detection is off, and the recorder's own hooks do nothing.
        """
        with self._busy(), torch.autograd.set_detect_anomaly(False), self._asleep():
            yield

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Inside, no graph is built, and the recorder's hooks do nothing."""
        self.busy = True
        _of_thread.measuring += 1
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False
            _of_thread.measuring -= 1

    @contextmanager
    def _or_stop(self, what: str) -> Iterator[None]:
        """Inside, an exception ends the recording of steps with a warning, but not the training."""
        try:
            yield
        except Exception as error:
            self._every, self._begun = 0, False
            self._curvature.fail()
            warn(f"steps are not recorded from step {self.number} on: measuring {what} failed with {named(error)}")

    def _await_forward(self) -> None:
        if self._curvature.due(self.number):
            self._batches.await_forward()

    def _measures(self) -> bool:
        """Whether this process measures this step."""
        return self._records() or (self._curvature.due(self.number) and not self._curvature.failed)

    def _records(self) -> bool:
        """Whether this step has a row, and this process takes part in measuring it."""
        return bool(self._every) and self.number % self._every == 0 and self._measurement.takes_part

    def _scalars(self, trained: Mapping[int, Group], stepped: list[int]) -> dict[str, Any]:
        skips = [self._skips.get(number) for number in stepped]
        scalars = {
            "learning_rate": lambda: self._groups.learning_rate(trained),
            "flow_step": lambda: self._groups.flow_step(trained),
            "flow_time": lambda: self._flow_time,
            "skipped": lambda: 0.0 if None in skips else torch.stack(skips).amin(),  # 1 if all were skipped
        }
        counted = {"step": self.number, "epoch": self._epochs.present}  # whole numbers, which are never missing
        return counted | {name: value() for name, value in scalars.items() if name in self._names}
