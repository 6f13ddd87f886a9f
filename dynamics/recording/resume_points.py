"""What a training that resumes needs beside its record's rows: flow time, and whether an epoch goes on, at a flush."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ..record.errors import RecordError
from ..record.store import Store

_NAME = "flow-times"
_MOST = 1000  # latest ones to keep: a training resumes at one of its last checkpoints


class ResumePoint(NamedTuple):
    """A point before a step: the flow time there, and whether the loop was ``within`` a pass over watched data."""

    flow_time: float
    within: bool = False  # unknown in records of earlier versions


class ResumePoints:
    """Keeps the points at which a record was flushed, by step; does nothing in processes that write no record."""

    def __init__(self, store: Store | None) -> None:
        self._store, self._process = store, os.getpid()

    def keep(self, step: int, point: ResumePoint) -> None:
        """Keep the point before a step; one that cannot be written will be unknown later."""
        if self._store is not None and self._process == os.getpid():
            with suppress(OSError, RecordError):
                latest = sorted((self._known() | {step: point}).items())[-_MOST:]
                self._write(dict(latest))

    def at(self, step: int) -> ResumePoint | None:
        """The point before a step; None if it was not kept."""
        return self._known().get(step)

    def forget_from(self, step: int) -> None:
        """Forget the points after a step at which a training resumes."""
        known = self._known()
        left = {one: point for one, point in known.items() if one <= step}
        if len(left) < len(known):
            self._write(left)

    def _known(self) -> dict[int, ResumePoint]:
        kept = self._store.kept(_NAME)
        rows = [] if kept is None else kept.tolist()
        return {int(step): ResumePoint(time, *map(bool, within)) for step, time, *within in rows}

    def _write(self, points: dict[int, ResumePoint]) -> None:
        rows = [(step, *point) for step, point in points.items()]
        self._store.keep(_NAME, np.array(rows, float).reshape(-1, 3))
