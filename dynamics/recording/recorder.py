"""The recorder: attaches to a training loop by optimizer hooks and decides when to measure; what, is in quantities.py.

It changes nothing in the training: weights, buffers, optimizer state and random numbers are, bit for bit, those of the
same run without it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..loop.batches import Batches
from ..loop.groups import Groups
from ..loop.processes import Processes
from ..measuring.probed_step import ProbedStep
from ..measuring.step import Measurement
from ..measuring.step_curvature import StepCurvature
from ..network.hooks import hooks_removed
from ..network.layers import Layers
from ..network.optimizers import as_given
from ..network.wrappers import unwrap
from ..probing.objective import Objective, cross_entropy_objective
from ..record import provenance
from ..warning import warn
from ..words import counted
from .arguments import (
    as_number,
    as_plain,
    check_arguments,
    check_attributes,
    check_epoch,
    check_pair,
    check_resume,
    check_scalar,
    optimizers,
    wanted,
)
from .attachment import Attachment
from .epochs import Epochs, Pass
from .event import Event
from .events import Events
from .missed import missed
from .resume_points import ResumePoints
from .resuming import begin
from .rows import Rows
from .steps import Steps, anyone_measures
from .termination import on_termination
from .watched import Watched, watched


class Recorder:
    """Records what a network's parameters, gradients and curvature do while it trains and is pruned.

    ::

        with Recorder("run.zarr", model, optimizer, curvature_every=64) as recorder:
            for inputs, labels in recorder.watch(loader):
                ...                                   # the loop as it was

    Args:
        path: where the record goes, a new folder. Open it with :func:`dynamics.open_run`, or with xarray alone, which
            recognises it by a name that ends in ``.zarr`` (or by ``engine="zarr"``).
        model: any module. Layers are the modules that own parameters, by qualified name.
        optimizer: a torch optimizer over the model's parameters, one that wraps it, or a list of several. Steps are
            counted from 0; with several optimizers one step is a step of each, or of those that step on the same batch.
        objective: ``objective(model, batch) -> scalar loss``: what the recorder evaluates itself, for curvature and for
            measured loss decreases. Needed only if the loss is not the cross-entropy of ``(inputs, labels)``. If a step
            has several batches, their mean is measured, weighted by samples, equally or otherwise, whichever the
            gradient shows. It may draw random numbers, and count or collect in variables of its own; all of this is
            restored afterwards. What it sends elsewhere, to a logger, say, is sent at each evaluation: ask
            :attr:`measuring`.
        every: record first-order quantities at every such step.
        curvature_every: measure gᵀHg, θᵀHg, ΔθᵀHΔθ and the loss decrease at every such step; 0 means never. If
            networks are trained in turn, choose a number that has no divisor in common with the steps of a turn, so
            that all of them are measured.
        capture: on a GPU, launch the kernels of a curvature measurement as CUDA graphs, from the second one on. This
            takes less time, above all in deep networks of small layers, but holds the memory of the activations all
            the while. It is for models that keep nothing but their buffers, and objectives that keep nothing; neither
            may make decisions in Python that change from step to step, nor use tensors that are replaced by others,
            such as a teacher's that is copied anew.
        quantities: names of the quantities of ``/steps`` and ``/curvature`` to record; None means all. Only what is
            named is computed; step and epoch are always recorded.
        attributes: what the run is, or its whole configuration: numbers, strings, or lists of them. Tables, claims and
            figures compare runs by their ``model``, ``data``, ``measure``, ``rounds``, ``sparsity`` and ``seed``, and
            do not average over runs that differ in anything else named here.
        resume: True continues the record at ``path``, after model and optimizer are loaded from a checkpoint, and
            begins a new one if there is none; "rewind" also drops what was recorded after the checkpoint. The record's
            attribute ``resumed`` keeps a trace. Call :meth:`flush` before saving a checkpoint. If that was amid an
            epoch, the first pass over a watched loader is the rest of it.
        step: the step at which a resumed training continues. By default it is found: the one at which every layer of
            the record had the model's ‖θ‖².

    Raises:
        FileExistsError: the path exists, and ``resume`` is False.
        BlockingIOError: another recorder is writing there.
        RecordError: what is there is not a record, or is damaged.
        TypeError, ValueError: an argument is not what it must be, or the record extends beyond the model's step.
            Nothing is written then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        objective: Objective = cross_entropy_objective,
        every: int = 1,
        curvature_every: int = 64,
        capture: bool = False,
        quantities: Iterable[str] | None = None,
        attributes: Mapping[str, Any] | None = None,
        resume: bool | Literal["rewind"] = False,
        step: int | None = None,
    ) -> None:
        check_arguments(model, objective, every, curvature_every)
        described = as_plain({} if attributes is None else attributes)
        check_attributes(described)
        check_resume(resume, step)
        names, curvature_names = wanted("steps", quantities), wanted("curvature", quantities)
        held, given, self._path = optimizers(optimizer), as_given(optimizer), path
        network, processes = unwrap(model), Processes(model)
        check_pair(model, held)
        self._layers = Layers(network)
        groups = Groups(held, given, self._layers)
        measurement = Measurement(self._layers, groups, processes, names)
        origin = provenance.attributes() | {"device": _device_name(self._layers.device)} | described
        present = measurement.present()
        begun = processes.in_writer(lambda: begin(path, origin, present, resume, step))
        store = None if begun is None else begun[0]
        place, past = processes.broadcast(begun and begun[1:])
        try:
            measurement.start_from(store, place.step, begins=place.begins)
        except BaseException:
            if store is not None:
                store.close()
            raise
        self._rows = Rows(store, self._layers.names)
        self._batches = Batches(
            model, self._layers.device, objective, groups.parameters, groups.of_anything, anyone_measures,
            averaged=processes.replicated,
        )  # fmt: skip
        probed = ProbedStep(measurement, self._layers, groups, processes, curvature_names)
        curvature_every = curvature_every if curvature_names else 0
        self._curvature = StepCurvature(
            network, objective, self._batches, probed, processes, place.step, curvature_every, capture=capture
        )
        self._epochs = Epochs(place, self._batches, self._rows.logged, lambda: self._steps.number)
        asleep = partial(hooks_removed, network, lambda owner: any(owner is one for one in (*held, *given)))
        self._steps = Steps(
            groups, measurement, self._curvature, self._batches, asleep, self._rows, self._epochs, place,
            ResumePoints(store), names, every,
        )  # fmt: skip
        self._events = Events(network, objective, self._layers, processes, self._steps, self._epochs, self._rows, past)
        self._attachment = Attachment(held, given, self._steps)
        self._termination = on_termination(self.flush)
        atexit.register(self._leave)

    # what the loop calls

    def watch(self, loader: Iterable) -> Watched:
        """Yield what the loader yields and remember each batch for the steps it leads to.

        Each pass is an epoch, except passes without a step, such as evaluations.
        """
        return watched(loader, self._begin_pass)

    def _begin_pass(self, length: Callable[[], int | None]) -> Pass:
        self._attachment.end()
        return Pass(self._epochs, partial(self._observe, stays=True), length)

    def observe(self, batch: Any) -> None:
        """Say what the next step's batch is, before its forward pass, if there is no loader to watch.

        Several batches before a step accumulate.
        """
        self._observe(batch, stays=False)

    def _observe(self, batch: Any, *, stays: bool, source: Pass | None = None) -> None:
        self._attachment.end()
        if self._attachment:
            self._steps.see(batch, stays=stays, source=source)

    def log(self, **scalars: float | Tensor | np.ndarray) -> None:
        """Add scalars to the row of the step, before or after ``optimizer.step()``; a tensor stays on its device.

        What is logged for each of several micro-batches of a step is averaged; in a closure that an optimizer calls
        several times within a step, what is logged the first time counts. A loop that does not tell its batches
        (:meth:`watch`, :meth:`observe`) and logs before the backward pass must do so from the first step on: otherwise
        the value is taken to belong to the step before.
        """
        for name, value in scalars.items():
            value = value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value
            check_scalar(name, value)
            value = as_number(value).clone() if isinstance(value, Tensor) else float(value)
            self._steps.log(name, value)

    def trust_loss(self) -> None:
        """Say that what is logged as ``loss`` is exactly the loss that is trained on, as a framework's callback knows.

        A warning then says where the objective differs from it by more than rounding, even if only by a factor.
        """
        self._curvature.trust_loss()

    def log_epoch(self, **scalars: float) -> None:
        """Append a row to ``/epochs``, e.g. ``log_epoch(test_accuracy=0.9, seconds=12.0)``, with the step to come.

        Accuracies are shares, from 0 to 1; other values raise a ValueError, and what was recorded until then stays.

        In a loop that watches no loader and does not call :meth:`begin_epoch`, an epoch ends here if a step was taken.
        In analyses and figures, what was logged before the first step belongs to epoch 0, and calls at the same step
        make one row.
        """
        self._attachment.end(alone=True)
        check_epoch(scalars)
        values = {name: as_number(value) for name, value in scalars.items()}
        step = self._steps.number + bool(self._attachment.under_way)
        self._rows.add("epochs", {"epoch": self._epochs.present, "step": step, **values})
        self._epochs.end()

    def begin_epoch(self, *, anew: bool = True) -> None:
        """Say that a pass over the data begins, if no loader is watched. Batches that led to no step are forgotten.

        Args:
            anew: False after a checkpoint from amid an epoch, which goes on.
        """
        self._attachment.end()
        self._epochs.begin(anew=anew)

    @contextmanager
    def event(
        self, kind: str, *, probe: Sequence[Any], mode: str | None = None, **attributes: float | str
    ) -> Iterator[Event]:
        """Measure before and after whatever happens inside, on the same batches: a row of ``/pruning``.

        Parameters are compared by name, so what happens inside may replace Parameter objects, as
        ``torch.nn.utils.prune`` does. With several processes, all of them have to come here, and do the same inside.

        Args:
            kind: what happens, e.g. ``"prune"``.
            probe: list of batches at which everything is evaluated.
            mode: "eval" or "train", the mode of BatchNorm and dropout at the probe. The default is "eval", with a
                warning where BatchNorm's running statistics lag far behind the weights.
            attributes: numbers and strings that describe the event; each becomes a variable over ``event``.

        Yields:
            An :class:`Event`, whose ``units`` takes scores and what is left alive.

        Raises:
            Whatever the body raises; then no row is written.
            ValueError: an argument is not what it must be, or was of another kind in an earlier event, or a parameter
                changes its shape inside, or processes do not change their replicas alike.
        """
        self._events.check(kind, probe, mode, attributes)
        self._attachment.end()
        with self._events.measured(kind, probe, mode, attributes) as event:
            yield event
            self._attachment.end()  # a step that was taken inside lies before the network as it is afterwards

    def flush(self) -> None:
        """Write everything recorded so far and wait until it is written, before a checkpoint is saved, for example.

        What is logged about the last step after that still joins its row. With several processes, the first one may
        flush alone, just as it may call :meth:`log_epoch` alone. If only some of several optimizers have stepped, their
        curvature is measured and written when the loop continues.
        """
        self._attachment.end(alone=True)
        try:
            self._steps.finish(self._attachment.under_way)
        finally:  # its warnings may be errors
            self._rows.flush()

    def close(self) -> None:
        """Detach from the optimizer, write what is left and wait for it. Nothing of the recorder stays behind.

        What cannot be written is lost with a warning, not an exception, which would cost what comes after the training.
        Unless an exception ends the training, a warning also says if it was not recorded, and why.
        """
        self._end(failed=sys.exception() is not None)

    def _leave(self) -> None:
        """Close at the interpreter's exit, without waiting for other processes."""
        self._steps.part()
        self._end(failed=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._end(failed=exception[0] is not None)

    def _end(self, *, failed: bool) -> None:
        if not self._attachment:
            return
        if sys.exception() is not None:
            self._steps.part()
        self._attachment.end()
        said: list[str] = []
        try:
            self._steps.finish(ends=True, fails=failed)
            said += missed(self._steps, self._batches, unseen=self._curvature.unseen)
        finally:  # its warnings may be errors
            self._attachment.close()
            self._batches.close()
            self._termination.close()
            atexit.unregister(self._leave)
            self._rows.close()
        for sentence in () if failed else said:
            warn(sentence)

    def __deepcopy__(self, memo: dict) -> Recorder:
        """Itself: the copy of a model that refers to its recorder refers to the same."""
        return self

    def __reduce__(self) -> tuple:
        """Nothing: what is saved with a model that refers to its recorder comes back without one."""
        return type(None), ()

    def __repr__(self) -> str:
        state = "recording" if self._attachment else "closed"
        extent = f"{counted(self._steps.number, 'step')}, {counted(len(self._layers), 'layer')}"
        return f"<Recorder {self._path}: {state}, {extent}>"

    @property
    def failure(self) -> Exception | None:
        """Why rows are missing in the record, now or for good; None while all is well."""
        return self._rows.failure

    @property
    def measuring(self) -> bool:
        """Whether the recorder itself is evaluating the model right now: hooks of one's own may want to wait."""
        return self._steps.busy


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
