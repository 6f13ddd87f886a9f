"""The rows of a record on their way: a step's row waits for what is logged after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from . import schema
from .buffer import Buffer
from .event import Event


class Rows:
    """Rows for a buffer; without one, in a process that does not write, they go nowhere."""

    def __init__(self, buffer: Buffer | None, layers: list[str]) -> None:
        self._buffer = buffer
        self._step: dict[str, Any] | None = None  # the row of the step that was
        self._of_last: dict[str, list[float | Tensor]] = {}
        self._logged: dict[str, list[float | Tensor]] = {}  # by name: for the step that was, or for the one to come
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

    def log(self, name: str, value: float | Tensor) -> None:
        """Keep a scalar of a step: of the one to come, or, with no batch observed since, of the one that was.

        Where batches are not announced, a name that the last step has already is of the step to come.
        """
        again = not self._announced and name in self._of_last
        logged = self._logged if self._waits or self._step is None or again else self._of_last
        logged.setdefault(name, []).append(value)

    def batch(self, *, first: bool) -> None:
        """A batch was observed, the first since a step or a further one; what was logged before it is of no step."""
        self._announced = self._waits = True
        if first:
            self._logged = {}

    def step(self, row: Mapping[str, Any] | None) -> None:
        """A step is done: send the last one's row and keep this one's; None if it is not recorded."""
        self.finish()
        self._step = row or {}
        self._of_last, self._logged, self._waits = self._logged, {}, False

    def finish(self) -> None:
        """Send the row of the step that was."""
        if self._step:
            self._step |= {name: sum(values) / len(values) for name, values in self._of_last.items()}
            self.add("steps", self._step)
        self._step, self._of_last = None, {}

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
