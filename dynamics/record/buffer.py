"""Rows wait here until a block of them is due, which a thread writes.

The training loop waits neither for the disk nor for the device: :meth:`Buffer.add` only keeps references.

Ctrl-C or a signal may interrupt the loop between any two bytecodes, and a signal handler may itself flush or close. So
shared state changes only by single calls that nothing can interrupt, and a row leaves the log only after a block that
contains it is in the writer's queue. A row may thus be sent twice; the writer takes it once.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time

import numpy as np

from ..warning import warn
from .columns import Row, stack
from .store import Store
from .writer import Amendment, Block, Entry, Look, Request, Writer

_LOG = logging.getLogger("thetadot")
_ROWS, _SECONDS = 256, 5.0
_BOUND = 256 * 2**20  # bytes that may wait for the disk


class Buffer:
    """Buffers rows for a store: a block is due every 256 rows or 5 seconds, whichever comes first.

    If the store cannot be written, a warning is logged, and the rows stay in memory and are tried again. When 256 MiB
    of them wait, recording stops with a warning, and training continues. In a forked process, such as a loader's
    worker, calls do nothing. Rows left when the program ends are written then.

    Args:
        store: where the rows go.
        look: called with the columns of each node as they are written, in the writing thread.
    """

    def __init__(self, store: Store, look: Look | None = None) -> None:
        self._store, self._process = store, os.getpid()
        self._log: dict[tuple[str, int], Entry] = {}  # by the row's identity: the same object is the same row
        self._since = time.monotonic()
        self._sent, self._dropped = 0, 0
        self._lost: dict[str, Row] = {}  # the last row of each node since recording stopped
        self._stopped: Exception | None = None
        self._stopped_since = ""
        self._closed = False
        self._writer = Writer(store, look)
        self._thread = threading.Thread(target=self._writer.run, name="thetadot-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def failure(self) -> Exception | None:
        """Why rows are missing, now or for good; None while all is well."""
        return self._stopped or self._writer.failure

    def coordinate(self, node: str, name: str, dim: str, values: np.ndarray) -> None:
        """Give a node a coordinate that does not grow. It may be given again if it is the same."""
        given = {(node, name, dim): values}
        if self._process == os.getpid():
            self._log.setdefault(("", id(given)), Entry("", given))

    def add(self, node: str, row: Row) -> None:
        """Keep one row of a node: name → number, string, or tensor over the node's further dimensions.

        Several variables may share a tensor, stacked along its first dimension, under the tuple of their names.

        The same object again is the same row of the node, so an interrupted call may be repeated. Until the node gets
        another row, it may then have further or changed values, even if the row is on the disk.

        Raises:
            ValueError: the buffer is closed.
        """
        if self._process != os.getpid():
            return
        if self._stopped is not None:
            self._dropped += self._lost.get(node) is not row
            self._lost[node] = row
            return
        entry = self._log.setdefault((node, id(row)), Entry(node, row)) if not self._closed else None
        if self._closed and not (entry and entry.taken):
            raise ValueError(f"the record {self._store.path} is closed: nothing more can be recorded in it")
        if len(self._log) >= _ROWS or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self, wait: bool = False) -> None:
        """Send the rows of all nodes, as one consistent cut, to the writing thread.

        Args:
            wait: return when they are written, or when writing has failed; :attr:`failure` says which.
        """
        if self._process != os.getpid():
            return
        self._since = time.monotonic()
        entries = [*self._log.values()]
        for entry in entries:
            if late := entry.late:
                self._writer.queue.put(Amendment(entry, *stack([late])))
                entry.sent = entry.sent | late
        if fresh := [entry for entry in entries if entry.sent is None]:
            self._send(fresh)
        self._forget(entries)
        if wait:
            self._ask(Request())

    def close(self) -> None:
        """Write what is left, wait for it, and close the store. What cannot be written is lost, with a warning."""
        if self._process != os.getpid() or not self._thread.is_alive():
            return
        self._closed = True
        self.flush()
        self._ask(Request(last=True))
        atexit.unregister(self.close)
        if missing := self._writer.missing.total() + self._dropped:
            since = self._writer.failing_since or self._stopped_since
            warn(
                f"the record {self._store.path} is incomplete: {missing} rows since {since} could not be written "
                f"({self.failure}). What was written before is kept"
            )

    def _send(self, entries: list[Entry]) -> None:
        waiting = self._sent - self._writer.written
        if waiting > _BOUND:
            self._stop(self._writer.failure or OSError("the disk cannot keep up"), entries)
            return
        said = [dict(entry.row) for entry in entries]
        try:
            block = _block(entries)
        except Exception as error:  # rows that do not fit together never will
            self._stop(error, entries)
            return
        self._writer.queue.put(block)
        for entry, row in zip(entries, said, strict=True):
            entry.sent = row
        self._sent += block.nbytes

    def _forget(self, entries: list[Entry]) -> None:
        """Drop rows that were sent, except each node's last, the only one that may be given again."""
        last = {entry.node: entry for entry in entries}
        for entry in entries:
            if entry.sent is not None and entry is not last[entry.node]:
                self._log.pop((entry.node, id(entry.row)), None)

    def _ask(self, request: Request) -> None:
        self._writer.queue.put(request)
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                request.done.get(timeout=0.05)
                return

    def _stop(self, error: Exception, lost: list[Entry]) -> None:
        """Stop recording with a warning; training continues."""
        self._stopped, self._stopped_since = error, time.strftime("%H:%M:%S")
        self._dropped += len(lost)
        self._lost = {entry.node: entry.row for entry in lost}
        self._log.clear()
        message = (
            f"recording into {self._store.path} stopped ({error}): training continues, but its later rows are lost"
        )
        _LOG.error(message)
        warn(message)


def _block(entries: list[Entry]) -> Block:
    """The rows of each node as columns, stacked on their device and being copied to the host's memory."""
    by_node: dict[str, list[Entry]] = {}
    for entry in entries:
        by_node.setdefault(entry.node, []).append(entry)
    coordinates = [(*of, values) for entry in by_node.pop("", []) for of, values in entry.row.items()]
    stacked = {node: stack(entry.row for entry in rows) for node, rows in by_node.items()}
    columns = {node: columns for node, (columns, _) in stacked.items()}
    return Block(coordinates, by_node, columns, [event for _, events in stacked.values() for event in events])
