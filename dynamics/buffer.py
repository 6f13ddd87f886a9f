"""Rows wait on the device; blocks of them leave it in one asynchronous copy a variable, written by a thread.

The training loop never waits for the disk, nor for the device: :meth:`Buffer.add` only keeps references.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .store import Store

_LOG = logging.getLogger("thetadot")
_ROWS, _SECONDS = 256, 5.0
LONGEST_TEXT = 64
_COUNTS = ("step", "epoch", "event")

Value = Tensor | np.ndarray | float | int | bool | str
Columns = dict[str, Tensor | np.ndarray]
Coordinate = tuple[str, str, str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """A consistent cut: rows of all nodes, on their way to the disk once ``copied`` has happened."""

    coordinates: list[Coordinate]
    columns: dict[str, Columns]
    copied: torch.cuda.Event | None


class Buffer:
    """Rows for a store: a block is due every 256 rows or 5 seconds, whichever comes first.

    If the store cannot be written, the rows stay in memory and every later block tries again; training goes on. What
    then still cannot be written when the buffer is closed raises there.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._coordinates: list[Coordinate] = []
        self._rows: dict[str, list[Mapping[str, Value]]] = {}
        self._count, self._since = 0, time.monotonic()
        self._blocks: queue.Queue[Block | None] = queue.Queue()
        self._failure: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._write_blocks, name="thetadot-writer", daemon=True)
        self._thread.start()

    def coordinate(self, node: str, name: str, dim: str, values: np.ndarray) -> None:
        """Give a node a coordinate that does not grow. Given again, it must be the same, and nothing happens."""
        self._coordinates.append((node, name, dim, values))

    def add(self, node: str, row: Mapping[str, Value]) -> None:
        """Keep one row of a node: name → number, string, or tensor over the node's further dimensions.

        Raises:
            ValueError: the buffer is closed.
        """
        if self._closed:
            raise ValueError(f"the record {self._store.path} is closed: nothing more can be recorded in it")
        self._rows.setdefault(node, []).append(row)
        self._count += 1
        if self._count >= _ROWS or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the rows of all nodes, one consistent cut, on their way to the disk."""
        if self._rows or self._coordinates:
            columns = {node: _stack(rows) for node, rows in self._rows.items()}
            self._blocks.put(Block(self._coordinates, columns, _copied()))
        self._coordinates, self._rows, self._count, self._since = [], {}, 0, time.monotonic()

    def close(self) -> None:
        """Write what is left and wait for it.

        Raises:
            OSError: rows that could not be written are lost; the record holds all that was committed before.
        """
        self.flush()
        self._closed = True
        self._blocks.put(None)
        self._thread.join()
        if self._failure is not None:
            raise OSError(f"the record {self._store.path} is incomplete: {self._failure}") from self._failure

    def _write_blocks(self) -> None:
        waiting: list[Callable[[], None]] = []
        while (block := self._blocks.get()) is not None:
            if block.copied is not None:
                waiting.append(block.copied.synchronize)
            waiting += [partial(self._store.write_coordinate, *coordinate) for coordinate in block.coordinates]
            waiting += [partial(self._append, node, columns) for node, columns in block.columns.items()]
            self._try(waiting)

    def _append(self, node: str, columns: Columns) -> None:
        self._store.append(node, _arrays(columns))

    def _try(self, waiting: list[Callable[[], None]]) -> None:
        try:
            while waiting:
                waiting[0]()
                del waiting[0]
            self._store.commit()
            self._failure = None
        except Exception as error:
            if self._failure is None:
                _LOG.warning("cannot write %s (%s): rows are kept in memory and tried again", self._store.path, error)
            self._failure = error


def _stack(rows: list[Mapping[str, Value]]) -> dict[str, Tensor | np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column(name, [row.get(name) for row in rows]) for name in names}


def _column(name: str, values: list[Value | None]) -> Tensor | np.ndarray:
    """One variable of a block; NaN where a row does not have it.

    A variable's type is that of its first block for good, so only what counts rows is whole; a 1 may be followed by ½.
    """
    given = [value for value in values if value is not None]
    sample = next((value for value in given if isinstance(value, Tensor)), given[0])
    if isinstance(sample, str):
        return np.array([value or "" for value in values], dtype=f"<U{LONGEST_TEXT}")
    if isinstance(sample, np.ndarray):
        return np.stack([np.full_like(sample, np.nan) if value is None else value for value in values])
    if not isinstance(sample, Tensor):
        whole = np.int64 if name in _COUNTS else np.float64
        return np.array([np.nan if value is None else value for value in values], whole)
    if sample.dtype in (torch.float16, torch.bfloat16):  # numpy has no bfloat16
        sample = sample.float()
    elif not sample.ndim and not sample.is_floating_point():
        sample = sample.double()
    tensors = [torch.full_like(sample, float("nan")) if value is None else torch.as_tensor(value) for value in values]
    column = torch.stack([tensor.to(sample) for tensor in tensors])
    if not column.is_cuda:
        return column
    return torch.empty_like(column, device="cpu", pin_memory=True).copy_(column, non_blocking=True)


def _copied() -> torch.cuda.Event | None:
    """An event that has happened once every copy asked for so far has."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _arrays(columns: Columns) -> dict[str, np.ndarray]:
    return {name: values if isinstance(values, np.ndarray) else values.numpy() for name, values in columns.items()}
