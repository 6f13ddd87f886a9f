"""The thread that takes blocks of rows from a queue and writes them, and tries again if the disk fails."""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from .columns import Columns, arrays
from .store import Store

_LOG = logging.getLogger("thetadot")
_RETRY_SECONDS = 10.0

Coordinate = tuple[str, str, str, np.ndarray]
Look = Callable[[str, Mapping[str, np.ndarray]], object]  # called with a node's name and its columns


@dataclass(eq=False)
class Entry:
    """A row of a node. ``taken``, set by the writer's thread alone: whether the writer has it.

    ``sent``, set by the training's thread alone: a copy of the row as it was last sent.
    """

    node: str
    row: Mapping[Any, Any]
    taken: bool = False
    sent: dict[Any, Any] | None = None

    @property
    def late(self) -> dict[Any, Any]:
        """The values that are new or changed since the row was sent."""
        if self.sent is None:
            return {}
        said = dict(self.row)  # copied in one call, because a signal handler may add to the row meanwhile
        return {name: value for name, value in said.items() if self.sent.get(name) is not value}


@dataclass(frozen=True)
class Amendment:
    """New values of a row that was already sent; they are in host memory once the events ``copied`` have passed."""

    entry: Entry
    columns: Columns
    copied: list[torch.cuda.Event]


@dataclass(frozen=True)
class Block:
    """A consistent cut: new rows of all nodes; they are in host memory once the events ``copied`` have passed."""

    coordinates: list[Coordinate]
    entries: dict[str, list[Entry]]
    columns: dict[str, Columns]
    copied: list[torch.cuda.Event]

    @property
    def nbytes(self) -> int:
        """Bytes that the block holds in the host's memory."""
        return sum(values.nbytes for columns in self.columns.values() for values in columns.values())


@dataclass(frozen=True)
class Request:
    """Asks to be told when all before it is written or has failed; after the ``last`` one the thread ends."""

    last: bool = False
    done: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class Writer:
    """Writes blocks to a store, in order. What fails is kept and tried again with the next block or after 10 seconds.

    Attributes:
        failure: why the last attempt to write failed; None if it did not.
        failing_since: time of day of the first failure since writing last succeeded.
        missing: how many rows of each node were taken, or amended, and are not committed so yet.
        written: bytes of all blocks that are committed.
    """

    def __init__(self, store: Store, look: Look | None = None) -> None:
        # a SimpleQueue, because a signal handler may interrupt one put with another
        self.queue: queue.SimpleQueue[Block | Amendment | Request] = queue.SimpleQueue()
        self.failure: Exception | None = None
        self.failing_since = ""
        self.missing: Counter[str] = Counter()
        self.written = 0
        self._store, self._look, self._taken = store, look, 0
        self._last: dict[str, Entry] = {}  # of each node
        self._tasks: deque[Callable[[], object]] = deque()

    def run(self) -> None:
        """Write until the last request: the thread's main loop."""
        while True:
            try:
                item = self.queue.get(timeout=_RETRY_SECONDS if self._tasks or self.failure else None)
            except queue.Empty:
                item = None
            if isinstance(item, Block):
                self._take(item)
            elif isinstance(item, Amendment):
                self._take_amendment(item)
            self._try()
            if isinstance(item, Request):
                if item.last:
                    self._store.close()
                item.done.put(None)
                if item.last:
                    return

    def _take(self, block: Block) -> None:
        """Queue the tasks for a block, but no row that was taken before: an interrupted flush may send rows twice."""
        self._tasks += [event.synchronize for event in block.copied]
        self._tasks += [partial(self._store.write_coordinate, *coordinate) for coordinate in block.coordinates]
        for node, entries in block.entries.items():
            fresh = np.array([not entry.taken for entry in entries])
            if fresh.any():
                self._tasks.append(partial(self._append, node, block.columns[node], fresh))
                self.missing[node] += int(fresh.sum())
                self._last[node] = entries[-1]
            for entry in entries:
                entry.taken = True
        self._taken += block.nbytes

    def _take_amendment(self, amendment: Amendment) -> None:
        """Queue an amendment if its row is still the node's last: an interrupted flush may send one again, too late."""
        node = amendment.entry.node
        if amendment.entry is self._last[node]:
            self._tasks += [event.synchronize for event in amendment.copied]
            self._tasks.append(lambda: self._store.amend(node, arrays(amendment.columns)))
            self.missing[node] = max(self.missing[node], 1)  # if rows are missing, the last is among them

    def _append(self, node: str, columns: Columns, fresh: np.ndarray) -> None:
        values = {name: values[fresh] for name, values in arrays(columns).items()}
        if self._look is not None:
            self._look(node, values)
        self._store.append(node, values)

    def _try(self) -> None:
        if not self._tasks and self.failure is None:
            return
        try:
            while self._tasks:
                self._tasks[0]()
                self._tasks.popleft()
            self._store.commit()
            self.missing.clear()
            self.failure, self.written = None, self._taken
        except Exception as error:
            if self.failure is None:
                self.failing_since = time.strftime("%H:%M:%S")
                _LOG.warning(
                    "cannot write %s (%s): its rows stay in memory, and writing is tried again", self._store.path, error
                )
            self.failure = error
