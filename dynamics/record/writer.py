"""The thread that takes blocks of rows out of a queue and writes them, again and again if the disk fails."""

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
Look = Callable[[str, Mapping[str, np.ndarray]], object]  # at the columns of a node


@dataclass(eq=False)
class Entry:
    """A row of a node. Only the writer's thread sets ``taken``, only the training's ``sent``: what it said then."""

    node: str
    row: Mapping[Any, Any]
    taken: bool = False
    sent: dict[Any, Any] | None = None

    @property
    def late(self) -> dict[Any, Any]:
        """What the row says, and did not when it was sent."""
        if self.sent is None:
            return {}
        said = dict(self.row)  # in one call: a signal's handler may let the row say more meanwhile
        return {name: value for name, value in said.items() if self.sent.get(name) is not value}


@dataclass(frozen=True)
class Amendment:
    """What a row says that is on its way, or on the disk; to be there once the events ``copied`` have happened."""

    entry: Entry
    columns: Columns
    copied: list[torch.cuda.Event]


@dataclass(frozen=True)
class Block:
    """A consistent cut: rows of all nodes, on their way to the disk once the events ``copied`` have happened."""

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
    """Somebody waits until all that came before is written or has failed; then the thread may end."""

    last: bool = False
    done: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)


class Writer:
    """Writes blocks to a store, in order. What fails is kept and tried again with the next block or in 10 seconds.

    Attributes:
        failure: why writing failed when it was last tried; None if it did not.
        failing_since: time of day of the first failure since writing last succeeded.
        missing: how many rows of each node were taken, or said more, and are not committed so.
        written: bytes of all blocks that are committed.
    """

    def __init__(self, store: Store, look: Look | None = None) -> None:
        # Its put may be interrupted by a put.
        self.queue: queue.SimpleQueue[Block | Amendment | Request] = queue.SimpleQueue()
        self.failure: Exception | None = None
        self.failing_since = ""
        self.missing: Counter[str] = Counter()
        self.written = 0
        self._store, self._look, self._taken = store, look, 0
        self._last: dict[str, Entry] = {}  # of each node
        self._tasks: deque[Callable[[], object]] = deque()

    def run(self) -> None:
        """Write until the last request."""
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
        """Line up what of a block was not taken before: an interrupted flush may send a row twice."""
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
        """Line it up, unless an interrupted flush sent it before rows that were taken since, and now again."""
        node = amendment.entry.node
        if amendment.entry is self._last[node]:
            self._tasks += [event.synchronize for event in amendment.copied]
            self._tasks.append(lambda: self._store.amend(node, arrays(amendment.columns)))
            self.missing[node] = max(self.missing[node], 1)  # any that are missing include the last

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
