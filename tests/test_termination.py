"""At SIGTERM what is left is written, and then happens what would have happened: in real processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dynamics.recording.termination import on_termination


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def calls() -> Iterator[list[str]]:
    calls: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("before"))
    yield calls
    signal.signal(signal.SIGTERM, before)


def test_the_handler_that_was_there_has_its_turn(calls: list[str]) -> None:
    with on_termination(lambda: calls.append("flush")):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["flush", "before", "before"]


def test_a_flush_that_fails_stops_nothing(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with on_termination(lambda: 1 / 0):
        os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["before"]
    assert "could not write what was left at SIGTERM" in caplog.text


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]])
def test_several_end_in_any_order(calls: list[str], order: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    active = {number: on_termination(lambda number=number: calls.append(str(number))) for number in range(3)}
    for ends in order:
        calls.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [*(str(number) for number in sorted(active, reverse=True)), "before"]
        active.pop(ends).close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_installed_since_stays() -> None:
    original = signal.getsignal(signal.SIGTERM)
    ours = on_termination(lambda: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours.close()
    assert signal.signal(signal.SIGTERM, original) == signal.SIG_IGN


def test_what_was_ignored_is_ignored() -> None:
    original, calls = signal.signal(signal.SIGTERM, signal.SIG_IGN), []
    with on_termination(lambda: calls.append("flush")):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.signal(signal.SIGTERM, original) == signal.SIG_IGN
    assert calls == ["flush"]


def test_in_another_thread_nothing_happens() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere() -> None:
        with on_termination(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


RECORDING = """
import os, signal, sys
from dynamics.record.buffer import Buffer
from dynamics.record.store import Store
from dynamics.recording.termination import on_termination

buffer = Buffer(Store(sys.argv[1], {"schema_version": 1}))
with on_termination(lambda: buffer.flush(wait=True)):
    for step in range(10):
        buffer.add("steps", {"step": step, "loss": 0.5 * step})
        if step == 6:
            {END}
"""


def run(path: Path, end: str) -> int:
    program = RECORDING.replace("{END}", end)
    return subprocess.run([sys.executable, "-c", program, path], cwd=Path(__file__).parents[1], check=False).returncode


@pytest.mark.parametrize(
    ("end", "status", "rows"),
    [("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, 7), ("sys.exit(3)", 3, 7), ("pass", 0, 10)],
)
def test_whatever_ends_the_process_the_rows_are_there(tmp_path: Path, end: str, status: int, rows: int) -> None:
    assert run(tmp_path / "run.zarr", end) == status
    steps = xr.open_datatree(tmp_path / "run.zarr")["steps"]
    np.testing.assert_array_equal(steps.loss, 0.5 * np.arange(rows))
