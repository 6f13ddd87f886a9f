"""Flow times at steps without a row, kept beside the record: a training may resume at a step that was not recorded."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np

from ..record.errors import RecordError
from ..record.store import Store

_NAME = "flow-times"
_MOST = 1000  # latest ones to keep: a training resumes at one of its last checkpoints


class FlowTimes:
    """Keeps pairs of a step and the flow time before it; does nothing in processes that write no record."""

    def __init__(self, store: Store | None) -> None:
        self._store, self._process = store, os.getpid()

    def keep(self, step: int, flow_time: float) -> None:
        """Keep the flow time before a step; one that cannot be written will be unknown later."""
        if self._store is not None and self._process == os.getpid():
            with suppress(OSError, RecordError):
                latest = sorted((self._known() | {step: flow_time}).items())[-_MOST:]
                self._write(dict(latest))

    def at(self, step: int) -> float | None:
        """The flow time before a step; None if it was not kept."""
        return self._known().get(step)

    def forget_from(self, step: int) -> None:
        """Forget the flow times after a step at which a training resumes."""
        known = self._known()
        left = {one: time for one, time in known.items() if one <= step}
        if len(left) < len(known):
            self._write(left)

    def _known(self) -> dict[float, float]:
        kept = self._store.kept(_NAME)
        return {} if kept is None else dict(kept.tolist())

    def _write(self, times: dict[float, float]) -> None:
        self._store.keep(_NAME, np.array([*times.items()], float).reshape(-1, 2))
