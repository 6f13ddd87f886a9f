"""The rows of a record on their way: a step's row waits for what is logged after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from . import schema
from .batches import Mark
from .buffer import Buffer
from .event import Event


class Rows:
    """Rows for a buffer; without one, in a process that does not write, they go nowhere."""

    def __init__(self, buffer: Buffer | None, layers: list[str]) -> None:
        self._buffer = buffer
        self._step: dict[str, Any] | None = None  # the row of the step that was
        self._of_last: dict[str, list[float | Tensor]] = {}  # what was logged for it
        self._before: set[str] = set()  # names that are logged before the backward pass of their step
        self._logged: dict[str, list[tuple[Mark, float | Tensor]]] = {}  # what was logged for the step to come
        self._announced = self._waits = False  # batches are observed; one was since the last step
        for node in ("steps", "curvature", "pruning"):
            self._coordinate(node, "layer", "layer", layers)
        self._coordinate("pruning", "stage", "stage", schema.STAGES)

    def _coordinate(self, node: str, name: str, dim: str, values: Any) -> None:
        if self._buffer is not None:
            self._buffer.coordinate(node, name, dim, np.array(values))

    def add(self, node: str, row: Mapping[str, Any]) -> None:
        """Send a row."""
        if self._buffer is not None:
            self._buffer.add(node, row)

    def add_units(self, number: int, event: Event) -> None:
        """Send an event's row of ``/units``, if it told of any, and of each study that was added to it."""
        for node, study in event.studies.items():
            for name, values in study.coords.items():
                self._coordinate(node, name, *values.dims, values.values)
            self.add(node, {"event": number, **{name: values.values for name, values in study.items()}})
        if event.alive:
            layers, index = zip(*event.unit_labels(), strict=True)
            self._coordinate("units", "layer", "unit", layers)
            self._coordinate("units", "index", "unit", index)
            self.add("units", {"event": number, **event.unit_row()})

    def log(self, name: str, value: float | Tensor, mark: Mark) -> None:
        """Keep a scalar of a step: of the one to come, or, with no batch observed since, of the one that was.

        A name that comes before the first backward pass always comes before its own; another one comes after it, and
        is of the step that was unless a backward pass has come since.
        """
        known = not self._announced or (self._waits and mark.counts)
        if self._step is None and known and not mark.backwards:
            self._before.add(name)
        if self._waits or mark.pending or name in self._before or self._step is None:
            self._logged.setdefault(name, []).append((mark, value))
        else:
            self._of_last.setdefault(name, []).append(value)

    def batch(self, *, first: bool) -> None:
        """A batch was observed, the first since a step or a further one; what was logged before it is of no step."""
        self._announced = self._waits = True
        if first:
            self._logged = {}

    def step(self, row: Mapping[str, Any] | None, mark: Mark) -> None:
        """A step is done: send the last one's row and keep this one's; None if it is not recorded.

        What was logged for a batch that is no part of the step is dropped.
        """
        self.finish()
        self._step = dict(row or {})
        kept = {
            name: [value for at, value in values if self._counts(name, at, mark)]
            for name, values in self._logged.items()
        }
        self._of_last = {name: values for name, values in kept.items() if values}
        self._logged, self._waits = {}, False

    def _counts(self, name: str, at: Mark, step: Mark) -> bool:
        if self._announced:
            return at.batches > step.first_batch
        return at.backwards >= step.first_backward - (name in self._before)

    def finish(self) -> None:
        """Send the row of the step that was. What is logged for it later is lost."""
        if self._step:
            self._step |= {name: sum(values) / len(values) for name, values in self._of_last.items()}
            self.add("steps", self._step)
            self._step = {}

    @property
    def failure(self) -> Exception | None:
        """Why rows are missing in the record; None while all is well."""
        return None if self._buffer is None else self._buffer.failure

    def flush(self) -> None:
        """Write everything and wait for it."""
        self.finish()
        if self._buffer is not None:
            self._buffer.flush(wait=True)

    def close(self) -> None:
        """Write everything and let the record go."""
        self.finish()
        if self._buffer is not None:
            self._buffer.close()
