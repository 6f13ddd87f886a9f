"""At SIGTERM what is left is written, and then happens what would have happened: in real processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch
import xarray as xr
from bytecodes import before_bytecode
from networks import plain_step, smooth_network, vectors

from dynamics import Recorder, open_run
from dynamics.loop.logged import Logged
from dynamics.recording.attachment import Attachment
from dynamics.recording.rows import Rows
from dynamics.recording.steps import Steps
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


def recorded(
    path: Path, act: Callable[[Recorder], None], at: int = 0, among: Callable | None = None, *, several: bool = False
) -> bool:
    """Record four steps; before a bytecode of a function ``act`` is called; returns whether it came there.

    If ``several``, each is one of two optimizers, and what they did is flushed when one of them is through.
    """
    model = smooth_network()
    parts = [model[:1], model[1:]] if several else [model]
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts]
    recorder = Recorder(path, model, optimizers, curvature_every=0)

    def within(code: CodeType) -> bool:
        return among is not None and code is among.__code__

    with suppress(KeyboardInterrupt), before_bytecode(at, lambda: act(recorder), within) as reached, recorder:
        for number, batch in enumerate(vectors(4)):
            recorder.log(before=number)
            plain_step(model, optimizers[0], batch)
            for other in optimizers[1:]:
                recorder.flush()
                other.step()
                other.zero_grad()
            recorder.log(number=float(number))
    return reached()


def interrupt(recorder: Recorder) -> None:
    raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.parametrize("act", [Recorder.flush, interrupt])
@pytest.mark.parametrize(
    "among", [Attachment._through, Steps.take_update, Rows.step, Logged._add_to_last], ids=lambda one: one.__qualname__
)
def test_a_row_is_right_or_missing_wherever_a_signal_comes(tmp_path: Path, among: Callable, act: Callable) -> None:
    torch.manual_seed(0)
    random, at = torch.get_rng_state(), 1
    recorded(tmp_path / "whole", act)
    whole = open_run(tmp_path / "whole")["steps"].load()
    while torch.set_rng_state(random) or recorded(path := tmp_path / str(at), act, at, among):
        steps = open_run(path)["steps"].load()
        rows = steps.sizes.get("step", 0)
        assert rows == 4 or act is interrupt
        for name in set(steps.data_vars) & set(whole.data_vars):
            found, expected = steps[name].values, whole[name].values[:rows]
            if (
                name == "number" and act is interrupt and np.isnan(found[-1:]).any()
            ):  # it would have come after the step
                found, expected = found[:-1], expected[:-1]
            np.testing.assert_array_equal(found, expected, err_msg=f"{name} at {at}")
        at += 5
    assert at > 1


@pytest.mark.long
@pytest.mark.parametrize("among", [Steps.finish, Rows.so_far, Rows.add, Rows.step], ids=lambda one: one.__qualname__)
def test_a_signal_comes_anywhere_among_rows_of_which_only_some_optimizers_have_stepped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, among: Callable
) -> None:
    """As among several processes, of which one may flush alone, and end no step by that."""
    monkeypatch.setattr(Steps, "together", True)
    torch.manual_seed(0)
    random, at = torch.get_rng_state(), 1
    recorded(tmp_path / "whole", Recorder.flush)
    whole = open_run(tmp_path / "whole")["steps"].load()
    while torch.set_rng_state(random) or recorded(path := tmp_path / str(at), Recorder.flush, at, among, several=True):
        xr.testing.assert_allclose(open_run(path)["steps"].dataset, whole.dataset, rtol=1e-12)
        at += 9
    assert at > 1
