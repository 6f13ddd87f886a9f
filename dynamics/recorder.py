"""The recorder: attaches to a training loop by optimizer hooks and decides when to measure; what, is in quantities.py.

It changes nothing in the training: weights, buffers, optimizer state and random numbers are, bit for bit, those of the
same run without it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import provenance, schema
from .arguments import check_arguments, check_description, check_scalar, wanted
from .buffer import Buffer
from .curvature import Expansion
from .event import Event, Stage, effect
from .layers import Layers
from .probe import Objective, Probe, RandomState, cross_entropy_objective, unwrap
from .quantities import FORMULAS, Vectors, minus
from .store import Store

_Measured = TypeVar("_Measured")


class Recorder:
    """Records what a network's parameters, gradients and curvature do while it trains and is pruned.

    ::

        with Recorder("run.zarr", model, optimizer, curvature_every=64) as recorder:
            for inputs, labels in recorder.watch(loader):
                ...                                   # the loop as it was

    Args:
        path: where the record goes, a new folder. Open it with :func:`dynamics.open_run`, or with xarray alone, which
            knows it by the name's end in ``.zarr`` (or by ``engine="zarr"``).
        model: any module. Layers are the modules that own parameters, by qualified name.
        optimizer: a torch optimizer over the model's parameters. Its steps are counted from 0.
        objective: ``objective(model, batch) -> scalar loss``: what the recorder evaluates itself, for curvature and for
            measured loss decreases. Needed only where the loss is not the cross-entropy of ``(inputs, labels)``.
        every: record first-order quantities at every such step.
        curvature_every: measure gᵀHg, θᵀHg, ΔθᵀHΔθ and the loss decrease at every such step; 0 means never.
        quantities: names of the quantities of ``/steps`` and ``/curvature`` to record; None means all. Nothing that
            was not asked for is computed.
        attributes: further attributes of the record, e.g. a configuration: numbers, strings, or lists of them.

    Raises:
        FileExistsError: the path exists.
        TypeError, ValueError: an argument is not what it must be. Nothing is written then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        objective: Objective = cross_entropy_objective,
        every: int = 1,
        curvature_every: int = 64,
        quantities: Iterable[str] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        check_arguments(model, optimizer, objective, every, curvature_every)
        self._steps, self._curvature = wanted("steps", quantities), wanted("curvature", quantities)
        self._model, self._optimizer, self._objective = unwrap(model), optimizer, objective
        self._every, self._curvature_every = every, curvature_every if self._curvature else 0
        self._layers = Layers(self._model)
        self._start = self._layers.theta_copy() if "distance_sqnorm" in self._steps else []
        self._step, self._epoch, self._events, self._flow_time = 0, 0, 0, 0.0
        self._batches: list[tuple[Any, RandomState | None]] = []
        self._logged: dict[str, float | Tensor] = {}
        self._row: dict[str, float | Tensor] = {}
        self._before: _Before | None = None
        self._busy = False
        origin = provenance.attributes() | {"device": _device_name(self._layers.device)}
        self._store = Store(path, origin | dict(attributes or {}))
        self._buffer = Buffer(self._store)
        for node in ("steps", "curvature", "pruning"):
            self._buffer.coordinate(node, "layer", "layer", np.array(self._layers.names))
        self._buffer.coordinate("pruning", "stage", "stage", np.array(schema.STAGES))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    # what the loop calls

    def watch(self, loader: Iterable) -> _Watched:
        """Yield what the loader yields and remember each batch until the step it leads to. Each pass is an epoch."""
        return _Watched(self, loader)

    def observe(self, batch: Any) -> None:
        """Say what the next step's batch is, where there is no loader to watch. Several batches accumulate."""
        if not self._batches:
            self._logged = {}
        due = self._due(self._curvature_every)
        self._batches.append((batch, RandomState(self._layers.device) if due else None))

    def log(self, **scalars: float | Tensor) -> None:
        """Add scalars to the row of the step, before or after ``optimizer.step()``; a tensor stays on its device."""
        for name, value in scalars.items():
            check_scalar(name, value)
            value = value.detach().reshape(()).clone() if isinstance(value, Tensor) else float(value)
            # With a batch seen, or the name logged before, the value is of the step to come; else of the step that was.
            upcoming = bool(self._batches) or not self._row or name in self._row
            (self._logged if upcoming else self._row)[name] = value

    def log_epoch(self, **scalars: float) -> None:
        """Append a row to ``/epochs``, e.g. ``log_epoch(test_accuracy=0.9, seconds=12.0)``."""
        self._buffer.add("epochs", {"epoch": self._epoch, **scalars})

    @contextmanager
    def event(
        self, kind: str, *, probe: Sequence[Any], mode: str = "eval", **attributes: float | str
    ) -> Iterator[Event]:
        """Measure before and after whatever happens inside, on the same batches: a row of ``/pruning``.

        Args:
            kind: what happens, e.g. ``"prune"``.
            probe: list of batches at which everything is evaluated.
            mode: "eval" or "train", the mode of BatchNorm and dropout at the probe.
            attributes: numbers and strings that describe the event; each becomes a variable over ``event``.

        Yields:
            An :class:`Event`, whose ``units`` takes scores and what is left alive.

        Raises:
            Whatever the body raises; then no row is written.
        """
        if not isinstance(probe, list | tuple) or not probe or mode not in ("train", "eval"):
            raise ValueError(f"event() needs a list of batches and mode 'train' or 'eval'; got {probe!r:.60}, {mode!r}")
        check_description(kind, attributes)
        states = [RandomState(self._layers.device)] * len(probe)
        before = self._stage(probe, mode, states)
        yield (event := Event())
        after = self._stage(probe, mode, states)
        row = {"event": self._events, "kind": kind, "mode": mode, "step": self._step, "epoch": self._epoch}
        self._buffer.add("pruning", row | attributes | effect(self._layers, before, after))
        self._add_units(event)
        self._events += 1

    def close(self) -> None:
        """Detach from the optimizer, write what is left and wait for it. Nothing of the recorder stays behind.

        Raises:
            OSError: some rows could not be written.
        """
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._finish_row()
            self._buffer.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "recording" if self._hooks else "closed"
        return f"<Recorder {self._store.path}: {state}, {self._step} steps, {len(self._layers)} layers>"

    # around a step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._busy:
            return None
        self._before = None  # that of a step which an exception ended
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._measure_before()
            return None
        measuring = self._measuring(closure)
        return (args, {**kwargs, "closure": measuring}) if "closure" in kwargs else ((args[0], measuring), kwargs)

    def _measuring(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with the measurement when it first returns: only then is the step's gradient there."""

        def measured() -> Any:
            loss = closure()
            if self._before is None:
                self._measure_before()
            return loss

        return measured

    def _measure_before(self) -> None:
        """Keep θ and g as they are before the step; the optimizer may overwrite either."""
        curvature = self._due(self._curvature_every) and bool(self._batches)
        if not (curvature or self._due(self._every)):
            return
        with self._measuring_now():
            probe = self._step_probe() if curvature else None
            self._before = _Before(
                theta=self._layers.theta_copy(),
                grad=self._layers.grad_copy(self._optimizer),
                probe=probe,
                expansion=self._or_give_up(probe.expand) if probe else None,
            )

    def _step_probe(self) -> Probe:
        batches, states = zip(*self._batches, strict=True)
        return Probe(self._model, self._objective, batches, random_states=states)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._busy:
            return
        self._finish_row()
        before, self._before = self._before, None
        flow_step = _flow_step(optimizer.param_groups[0])
        if before is not None:
            with self._measuring_now():
                update = minus(self._layers.theta(), before.theta)
                if self._due(self._every):
                    self._row = self._scalars(flow_step) | self._step_values(before, update) | self._logged
                if before.expansion is not None:
                    values = self._or_give_up(lambda: self._curvature_values(before, update))
                    if values is not None:
                        self._buffer.add("curvature", {"step": self._step, **values})
        # The row of a step that is not recorded takes what is logged, and is dropped.
        self._row = self._row or {"step": None, **self._logged}
        self._step += 1
        self._flow_time += flow_step
        self._batches, self._logged = [], {}

    def _scalars(self, flow_step: float) -> dict[str, float | Tensor]:
        found = getattr(self._optimizer, "found_inf", None)
        scalars = {
            "learning_rate": float(self._optimizer.param_groups[0]["lr"]),
            "flow_step": flow_step,
            "flow_time": self._flow_time,
            "epoch": self._epoch,
            "skipped": 0.0 if found is None else found.detach().reshape(()).clone(),
        }
        return {"step": self._step} | {name: value for name, value in scalars.items() if name in self._steps}

    def _step_values(self, before: _Before, update: list[Tensor]) -> dict[str, Tensor]:
        vectors = Vectors(
            theta=before.theta,
            grad=before.grad,
            update=update,
            start=self._start,
            decay=self._layers.decay(self._optimizer) if "decay_sqnorm" in self._steps else None,
        )
        return self._layers.evaluate((name for name in self._steps if name in FORMULAS), vectors)

    def _curvature_values(self, before: _Before, update: list[Tensor]) -> dict[str, Tensor]:
        expansion, names = before.expansion, [name for name in self._curvature if name in FORMULAS]
        wants_hess_grad = {"grad_hess_grad", "param_hess_grad"} & set(names)
        vectors = Vectors(
            theta=before.theta,
            grad=expansion.grad,
            update=update,
            hess_grad=expansion.hessian_product(expansion.grad) if wants_hess_grad else (),
            hess_update=expansion.hessian_product(update) if "update_hess_update" in names else (),
        )
        values = self._layers.evaluate(names, vectors)
        if "loss_before" in self._curvature:
            values["loss_before"] = expansion.loss
        if "loss_after" in self._curvature:
            values["loss_after"] = before.probe.loss()
        return values

    def _or_give_up(self, measure: Callable[[], _Measured]) -> _Measured | None:
        """What a probe measures; where it fails, the training goes on without curvature, and a warning says so."""
        try:
            return measure()
        except Exception as error:
            self._curvature_every = 0
            warnings.warn(
                f"curvature is not recorded from step {self._step} on: the objective failed on this step's batch with "
                f"{type(error).__name__}: {' '.join(str(error).split())}. Give the recorder what fits model and "
                "loader: Recorder(..., objective=lambda model, batch: <scalar loss>), or curvature_every=0",
                stacklevel=2,
            )
            return None

    def _finish_row(self) -> None:
        """Send the last step's row; until the next step it waited for what is logged after ``optimizer.step()``."""
        if self._row.get("step") is not None:
            self._buffer.add("steps", self._row)
        self._row = {}

    # small things

    def _stage(self, batches: Sequence[Any], mode: str, states: Sequence[RandomState]) -> Stage:
        with self._measuring_now():
            probe = Probe(self._model, self._objective, batches, mode=mode, random_states=states)
            return Stage(self._layers, probe.expand())

    def _add_units(self, event: Event) -> None:
        if not event.alive:
            return
        layers, index = zip(*event.unit_labels(), strict=True)
        self._buffer.coordinate("units", "layer", "unit", np.array(layers))
        self._buffer.coordinate("units", "index", "unit", np.array(index))
        self._buffer.add("units", {"event": self._events, **event.unit_row()})

    def _due(self, every: int) -> bool:
        return bool(every) and self._step % every == 0

    @contextmanager
    def _measuring_now(self) -> Iterator[None]:
        """Inside, no graph is built but the probes' own, and hooks that a measurement sets off do nothing."""
        self._busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._busy = False


@dataclass(frozen=True)
class _Before:
    """The moment before a step."""

    theta: list[Tensor]
    grad: list[Tensor]
    probe: Probe | None
    expansion: Expansion | None


class _Watched:
    """A loader under watch: as long as the loader, and yields what it yields."""

    def __init__(self, recorder: Recorder, loader: Iterable) -> None:
        self._recorder, self._loader, self._passes = recorder, loader, 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        if self._passes or self._recorder._step:
            self._recorder._epoch += 1
        self._passes += 1
        self._recorder._batches = []  # of a pass that was broken off before its step
        for batch in self._loader:
            self._recorder.observe(batch)
            yield batch


def _flow_step(group: Mapping[str, Any]) -> float:
    """Flow time of a step: η, and with SGD's momentum β its long-run sum η(1−dampening)/(1−β)."""
    momentum = float(group.get("momentum") or 0.0)
    rate = float(group["lr"])
    return rate * (1 - float(group.get("dampening") or 0.0)) / (1 - momentum) if 0 < momentum < 1 else rate


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
