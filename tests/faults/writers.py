"""What the processes that are killed do. Each value follows from its step and from how often the record was rewound."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from dynamics.record import store
from dynamics.record.buffer import Buffer
from dynamics.record.store import Store

LAYERS = np.array(["first", "second", "third"])
ATTRIBUTES = {"schema_version": 1}
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def rows(start: int, stop: int, generation: int = 0) -> dict[str, np.ndarray]:
    """The rows of steps, each distinct from all others and from those of another generation."""
    step = np.arange(start, stop)
    value = np.sqrt(step) + 1000.0 * generation
    return {"step": step, "loss": value, "grad_sqnorm": value[:, None] + np.array([0.125, 0.25, 0.5])}


def halved(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of every second step, as curvature is measured."""
    return {name: values[rows["step"] % 2 == 0] for name, values in rows.items()}


def append(target: Store, start: int, stop: int, generation: int = 0) -> None:
    """A block: a consistent cut of two nodes."""
    block = rows(start, stop, generation)
    target.append("steps", block)
    if len(halved(block)["step"]):
        target.append("curvature", halved(block))
    target.commit()


def opened(path: Path) -> Store:
    """The record, new or gone on with. Small chunks, so that many are begun and filled."""
    store._CHUNK_ROWS.update(steps=16, curvature=8)
    return Store.reopen(path) if path.exists() else Store(path, ATTRIBUTES)


def write_blocks(path: Path, acknowledge: Connection, seed: int) -> None:
    """Append blocks for ever and say after each commit how many steps are there."""
    random = np.random.default_rng(seed)
    target = opened(path)
    acknowledge.send(step := target.lengths["steps"])
    while True:
        stop = step + int(random.integers(1, 24))
        append(target, step, stop)
        acknowledge.send(step := stop)


def write_rows(path: Path, acknowledge: Connection, seed: int) -> None:
    """The same through a buffer, row by row."""
    random = np.random.default_rng(seed)
    buffer = Buffer(target := opened(path))
    acknowledge.send(step := target.lengths["steps"])
    while True:
        for _ in range(int(random.integers(1, 24))):
            row = {
                name: values[0] if values.ndim == 2 else values.item() for name, values in rows(step, step + 1).items()
            }
            buffer.add("steps", row)
            if step % 2 == 0:
                buffer.add("curvature", dict(row))
            step += 1
        buffer.flush(wait=True)
        acknowledge.send(step)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(operation: int, path: Path, half: bool) -> None:
    """Kill this process before its n-th change of a file under the path; or in the middle of its n-th write."""
    left = operation

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        changes = event in _CHANGES or (event == "open" and arguments[2] is not None and arguments[2] & os.O_CREAT)
        if (
            changes
            and str(path.parent) in str(arguments[0])
            and not (event == "os.mkdir" and Path(arguments[0]).exists())
        ):
            left -= 1
            if left == 0:
                _die()

    def write_half(file: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        with file.open("wb") as opened:
            opened.write(data[: len(data) // 2] if left == 0 else data)
        if left == 0:
            _die()

    if half:
        Path.write_bytes = write_half
    else:
        sys.addaudithook(count)


def create(path: Path, operation: int, half: bool) -> None:
    """Create a record and die on the way."""
    die_at(operation, path, half)
    opened(path).close()


def go_on(path: Path, operation: int, half: bool) -> None:
    """Resume, append, amend, rewind, append, and die on the way. The record passes through :func:`snapshots`."""
    die_at(operation, path, half)
    target = opened(path)
    append(target, 20, 38)
    target.amend("steps", {"loss": np.array([-1.0])})
    target.commit()
    target.truncate({"steps": 10, "curvature": 5})
    target.note("rewinds", [{"step": 10}])
    target.keep("start", np.arange(100.0))
    append(target, 10, 30, generation=1)
    target.close()


def snapshots() -> list[dict[str, np.ndarray]]:
    """``/steps`` after each commit of :func:`go_on`, from a record of 20 steps on."""
    kept, new, amended = rows(0, 10), rows(10, 30, generation=1), rows(0, 38)
    amended["loss"][-1] = -1.0
    return [rows(0, 20), rows(0, 38), amended, kept, {name: np.concatenate([kept[name], new[name]]) for name in kept}]


def fill_the_disk(path: Path, acknowledge: Connection) -> None:
    """Write through a buffer while no file may grow beyond a few bytes, then while it may again."""
    import warnings

    from dynamics.record import writer

    warnings.simplefilter("error")  # nothing but the log says anything
    writer._RETRY_SECONDS = 0.01
    buffer = Buffer(opened(path))
    for step in range(20):
        buffer.add("steps", {"step": step, "loss": float(rows(step, step + 1)["loss"][0])})
    buffer.flush(wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    for step in range(20, 40):
        buffer.add("steps", {"step": step, "loss": float(rows(step, step + 1)["loss"][0])})
        buffer.flush(wait=True)
    acknowledge.send(str(buffer.failure))
    acknowledge.recv()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while buffer.failure is not None:
        time.sleep(1e-3)
    acknowledge.send("written")
    acknowledge.recv()


PROGRAMS: dict[str, Callable] = {"blocks": write_blocks, "rows": write_rows}
