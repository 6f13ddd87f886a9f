"""The rows of a record before they are written: a step's row waits for what is logged after the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import schema
from ..loop.logged import Logged, Scalar
from ..loop.seen import Position
from ..record.buffer import Buffer
from ..record.columns import Row
from ..record.store import Store
from .event import Event
from .finite_gradients import FiniteGradients


class Rows:
    """Sends rows to a store; without one, in a process that does not write, they are dropped.

    What is ``logged`` for a step joins its row, and ``gradients`` checks each row on the way.
    """

    def __init__(self, store: Store | None, layers: list[str]) -> None:
        self.gradients = FiniteGradients(layers)
        self._buffer = None if store is None else Buffer(store, self.gradients.look)
        self.logged = Logged()
        self._step: dict[Any, Any] = {}  # the row of the last step
        self._so_far: dict[Any, Any] = {}  # the row of the step that is under way, if it was sent
        for node in ("steps", "curvature", "pruning"):
            self._coordinate(node, "layer", "layer", layers)
        self._coordinate("pruning", "stage", "stage", schema.STAGES)

    def _coordinate(self, node: str, name: str, dim: str, values: Any) -> None:
        if self._buffer is not None:
            self._buffer.coordinate(node, name, dim, np.array(values))

    def add(self, node: str, row: Row) -> None:
        """Send a row."""
        if self._buffer is not None:
            self._buffer.add(node, row)
            self.gradients.say()

    def add_event_extras(self, number: int, event: Event) -> None:
        """Send what was added to an event: its row of ``/units``, if any, and a row of each study."""
        for node, study in event.studies.items():
            for name, values in study.coords.items():
                (dim,) = values.dims
                self._coordinate(node, str(name), str(dim), values.values)
            self.add(node, {"event": number, **{str(name): values.values for name, values in study.items()}})
        if event.alive:
            layers, index = zip(*event.unit_labels(), strict=True)
            self._coordinate("units", "layer", "unit", layers)
            self._coordinate("units", "index", "unit", index)
            self.add("units", {"event": number, **event.unit_row()})

    def step(self, row: Row | None, position: Position, *, late: bool) -> Mapping[str, Scalar]:
        """A step is done: send the row of the one before, and keep this one's, which is None if it is not recorded.

        Returns what was logged for the one before.
        """
        last, self._step = self._step, {}  # a signal handler that flushes must not send it while its scalars change
        logged = self.logged.step(position, late=late)
        if not self._so_far:
            self._send(last, logged)
        known = self._so_far or {}
        known |= row or {}
        self._step, self._so_far = known, {}
        return logged

    def so_far(self, row: Row, position: Position) -> None:
        """Send the row of the step under way as it is now, after the row of the last step."""
        of_last, logged = self.logged.so_far(position)
        if not self._so_far:
            self._send(self._step, of_last)
        self._so_far |= {**row, **logged}
        self.add("steps", self._so_far)

    def finish(self, *, ends: bool = False) -> Mapping[str, Scalar]:
        """Send the row of the last step, and return what was logged for it; what is logged later is still added.

        If the training ``ends``, scalars that wait for another step join this row, unless it has the name already.
        """
        logged = self.logged.of_last(ends=ends)
        if not self._so_far:  # else it was sent already, and another row after it
            self._send(self._step, logged)
        return logged

    def _send(self, row: dict[Any, Any], logged: Mapping[str, Scalar]) -> None:
        if row:
            row |= logged
            self.add("steps", row)

    @property
    def failure(self) -> Exception | None:
        """Why rows are missing in the record; None while all is well."""
        return None if self._buffer is None else self._buffer.failure

    def flush(self) -> None:
        """Write everything and wait for it."""
        self.finish()
        if self._buffer is not None:
            self._buffer.flush(wait=True)
            self.gradients.say()

    def close(self) -> None:
        """Write everything and close the record."""
        self.finish(ends=True)
        self._step = {}
        if self._buffer is not None:
            self._buffer.close()
            self.gradients.say()
