"""The events of a training: the network is measured before and after whatever changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import named
from ..loop.processes import Processes
from ..network.layers import Layers
from ..network.masks import parameter_masks
from ..network.structure import Structure
from ..probing.moment import Moment
from ..probing.objective import Objective
from ..probing.probe import Probe
from ..warning import warn
from ..words import counted
from .arguments import as_number, check_description
from .epochs import Epochs
from .event import Event, Stage, effect
from .past_events import PastEvents
from .rows import Rows
from .running_statistics import RunningStatistics
from .steps import Steps


class Events:
    """Measures a network before and after each change, and sends a row for it, after those of ``past`` events."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        layers: Layers,
        processes: Processes,
        steps: Steps,
        epochs: Epochs,
        rows: Rows,
        past: PastEvents,
    ) -> None:
        self._model, self._objective, self._layers, self._processes = model, objective, layers, processes
        self._steps, self._epochs, self._rows, self._past = steps, epochs, rows, past
        self._statistics = RunningStatistics(model)

    def check(self, kind: str, probe: Any, mode: str | None, attributes: Mapping[str, Any]) -> None:
        """Raise ValueError if an event with these arguments cannot be measured or recorded."""
        if mode not in ("train", "eval", None):
            raise ValueError(f"event() takes mode 'train' or 'eval', got {mode!r:.60}")
        if not isinstance(probe, list | tuple) or not probe:
            raise ValueError(f"event() needs a list of batches as its probe, got {probe!r:.60}")
        if self._processes.sharded:
            raise ValueError("event() needs all parameters in one process, but FSDP2 shards them: record steps only")
        check_description(kind, attributes, self._past.texts)

    @contextmanager
    def measured(
        self, kind: str, probe: Sequence[Any], given: str | None, attributes: Mapping[str, Any]
    ) -> Iterator[Event]:
        """Measure before and after the body; the row is sent unless that raises. ``given``: the mode, if one was."""
        mode = given or "eval"
        described = {name: as_number(value) for name, value in attributes.items()}
        moment, structure = Moment(self._model, self._layers.device, self._objective), Structure(self._model)
        before = self._stage(probe, mode, [moment] * len(probe))
        if given is None and self._statistics.may_lag:
            self._statistics.compare(before.loss, self._loss_in_training(probe, [moment] * len(probe), before.loss))
        yield (event := Event(self._model, self._past))
        after = self._stage(probe, mode, [moment.later()] * len(probe))
        if not self._processes.is_same(after.theta):
            raise ValueError(
                "inside event() the networks of the processes became different, and would stay so: plan the "
                "pruning on the same batches in all processes"
            )
        now = {"step": self._steps.number, "epoch": self._epochs.present}
        row: dict[str, Any] = {"event": self._past.count, "kind": kind, "mode": mode, **now}
        with structure.again():  # predictions evaluate the network from before
            found = effect(self._layers, before, after)
        if kind == "prune" and not found["removed"].any():
            self._say_nothing_is_removed(before, after, described)
        self._rows.add("pruning", row | described | found)
        self._rows.add_event_extras(self._past.count, event)
        self._past = self._past.and_now(described, event.unit_labels(), event.studies, pruned=kind == "prune")

    def _say_nothing_is_removed(self, before: Stage, after: Stage, described: Mapping[str, Any]) -> None:
        """Warn that a pruning removed nothing, if it had something to do: only what is masked counts as removed."""
        if described.get("target") == 0 or described.get("sparsity") == self._past.sparsity:
            return
        pruning = f"the pruning before step {self._steps.number}"
        if before.has_parameters_of(after):
            masked = not all(mask.all() for mask in parameter_masks(self._model).values())
            warn(
                f"{pruning} changed no parameter, so nothing counts as removed and "
                f"predictions are 0: {'unless it had all been pruned before, ' if masked else ''}prune the model that "
                "the recorder was given, not a copy of it, with torch.nn.utils.prune or apply_masks; a mask that the "
                "forward pass itself applies is not seen"
            )
        elif zeroed := int(((before.theta != 0) & (after.theta == 0)).sum()):
            warn(
                f"{pruning} set {counted(zeroed, 'parameter')} to zero without a mask, so nothing counts as removed: "
                "the optimizer may move them again. Mask them, with apply_masks, or with torch.nn.utils.prune and "
                "without its remove()"
            )

    def _stage(self, batches: Sequence[Any], mode: str, moments: Sequence[Moment]) -> Stage:
        with self._steps.measuring():
            self._layers.refresh()
            probe = Probe(self._model, self._objective, batches, mode=mode, moments=moments)
            expansion, failure = None, None
            try:
                expansion = probe.expand()
            except Exception as error:
                failure = error
            if not self._processes.all_agree(failure is None, self._layers.device):
                what = "in another process" if failure is None else f"with {named(failure)}"
                raise ValueError(
                    f"event(): the objective failed on the probe's batches in mode {mode!r} {what}"
                ) from failure
            return Stage(self._layers, self._processes, expansion)

    def _loss_in_training(self, batches: Sequence[Any], moments: Sequence[Moment], like: Tensor) -> Tensor:
        """The probe's loss in training mode; NaN if it fails, as BatchNorm does on a single value per channel."""
        with self._steps.measuring():
            try:
                loss = Probe(self._model, self._objective, batches, mode="train", moments=moments).loss()
            except Exception:  # only for a warning: in eval mode, which is recorded, it did not fail
                loss = torch.full_like(like, torch.nan)
            return self._processes.mean([loss])[0]
