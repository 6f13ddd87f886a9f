"""The flow time where no row tells it, kept beside the record: a training goes on at steps that were not recorded."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np

from ..record.reading import RecordError
from ..record.store import Store

_NAME = "flow-times"


class FlowTimes:
    """Pairs of a step and the flow time before it; none in processes that write no record."""

    def __init__(self, store: Store | None) -> None:
        self._store, self._process = store, os.getpid()

    def keep(self, step: int, flow_time: float) -> None:
        """One more; where it cannot be written, it is not known later."""
        if self._store is not None and self._process == os.getpid():
            with suppress(OSError, RecordError):
                pairs = dict(self._pairs()) | {step: flow_time}
                self._store.keep(_NAME, np.array([*pairs.items()], float))

    def at(self, step: int) -> float | None:
        """The flow time before a step, if it was kept."""
        return dict(self._pairs()).get(step)

    def forget_from(self, step: int) -> None:
        """A training goes on at a step: what comes later comes anew."""
        pairs = self._pairs()
        left = [pair for pair in pairs if pair[0] <= step]
        if len(left) < len(pairs):
            self._store.keep(_NAME, np.array(left).reshape(-1, 2))

    def _pairs(self) -> list[tuple[float, float]]:
        kept = self._store.kept(_NAME)
        return [] if kept is None else [tuple(pair) for pair in kept.tolist()]
