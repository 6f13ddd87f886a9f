"""No row is lost and none is written twice: interrupted anywhere, the disk full for a while or for good, forked."""

import logging
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from bytecodes import before_bytecode

from dynamics.record import buffer, writer
from dynamics.record.buffer import Buffer
from dynamics.record.columns import arrays, stack


class Memory:
    """A store that keeps what it is given, and fails while it is told to."""

    path = Path("run.zarr")

    def __init__(self) -> None:
        self.appended: dict[str, list[float]] = {}
        self.coordinates: dict[str, object] = {}
        self.committed = 0
        self.full = False
        self.closed = False

    def _fail_when_full(self) -> None:
        if self.full:
            raise OSError("No space left on device")

    def write_coordinate(self, node: str, name: str, dim: str, values: object) -> None:
        self._fail_when_full()
        self.coordinates[node] = values

    def append(self, node: str, rows: dict[str, np.ndarray]) -> None:
        self._fail_when_full()
        self.appended.setdefault(node, []).extend(rows["value"].tolist())

    def amend(self, node: str, row: dict[str, np.ndarray]) -> None:
        self._fail_when_full()
        for value in row.get("value", ()):
            self.appended[node][-1] = value.item()

    def commit(self) -> None:
        self._fail_when_full()
        self.committed = sum(map(len, self.appended.values()))

    def close(self) -> None:
        self.closed = True


def interrupted(work: Callable[[], None], at: int, action: Callable[[], None]) -> bool:
    """Run the work, with the action before the ``at``-th bytecode of buffer.py or writer.py, if there are so many."""
    with before_bytecode(at, action, lambda code: code.co_filename in (buffer.__file__, writer.__file__)) as reached:
        work()
    return reached()


class Loop:
    """Adds rows and forgets each once it is added, so that after an interruption it goes on with the same row."""

    def __init__(self, rows: Buffer) -> None:
        self.rows = rows
        self.pending = deque((node, {"value": 10.0 * step}) for step in range(4) for node in ("steps", "epochs"))

    def run(self) -> None:
        while self.pending:
            self.rows.add(*self.pending[0])
            self.pending.popleft()
        self.rows.flush(wait=True)


def ctrl_c(loop: Loop) -> None:
    raise KeyboardInterrupt


def handler_flushes(loop: Loop) -> None:
    loop.rows.flush(wait=True)


def handler_adds_and_flushes(loop: Loop) -> None:
    if loop.pending:
        loop.rows.add(*loop.pending[0])
    loop.rows.flush(wait=True)


def handler_flushes_then_ctrl_c(loop: Loop) -> None:
    loop.rows.flush()
    raise KeyboardInterrupt


def interrupted_anywhere(kind: type[Loop], action: Callable[[Loop], None]) -> Iterator[tuple[int, Memory]]:
    """What was stored of a loop that was interrupted at the first bytecode and went on, at the second, and so on."""
    for at in count(1):
        store = Memory()
        rows = Buffer(store)
        rows.coordinate("steps", "layer", "layer", np.array(["a"]))
        loop = kind(rows)
        try:
            reached = interrupted(loop.run, at, lambda loop=loop: action(loop))
        except KeyboardInterrupt:
            reached = True
            loop.run()
        rows.close()
        yield at, store
        if not reached:
            break
    assert at > 1000


@pytest.mark.long
@pytest.mark.parametrize("action", [ctrl_c, handler_flushes, handler_adds_and_flushes, handler_flushes_then_ctrl_c])
def test_interrupted_at_any_bytecode(monkeypatch: pytest.MonkeyPatch, action: Callable[[Loop], None]) -> None:
    monkeypatch.setattr(buffer, "_ROWS", 4)
    for at, store in interrupted_anywhere(Loop, action):
        assert store.appended == {"steps": [0.0, 10.0, 20.0, 30.0], "epochs": [0.0, 10.0, 20.0, 30.0]}, at
        assert store.committed == 8
        assert store.closed


class Amending(Loop):
    """Flushes after each step, of which it knows a value only then."""

    def __init__(self, rows: Buffer) -> None:
        super().__init__(rows)
        self.last: dict[str, float] = {}

    def run(self) -> None:
        while self.pending:
            node, row = self.pending[0]
            if node == "steps" and self.last and row is not self.last:
                self.last["value"] = 10.0 * (len(self.pending) // 2)
                self.rows.add("steps", self.last)
            self.last = row if node == "steps" else self.last
            self.rows.add(node, row)
            if node == "steps":
                self.rows.flush()
            self.pending.popleft()
        self.rows.flush(wait=True)


@pytest.mark.long
@pytest.mark.parametrize("action", [ctrl_c, handler_flushes, handler_flushes_then_ctrl_c])
def test_a_row_that_says_more_after_a_flush_interrupted_at_any_bytecode(action: Callable[[Loop], None]) -> None:
    for at, store in interrupted_anywhere(Amending, action):
        assert store.appended == {"steps": [30.0, 20.0, 10.0, 30.0], "epochs": [0.0, 10.0, 20.0, 30.0]}, at


@pytest.mark.parametrize("known", [False, True])
def test_a_row_says_more_after_a_signal_that_came_in_a_flush(known: bool) -> None:
    """The handler sends the last row, or one that the flush knows and that says more now, as Recorder.flush() does."""
    for at in count(1):
        store = Memory()
        rows, last = Buffer(store), {"value": 2.0}
        if known:
            rows.add("steps", last)
            rows.flush(wait=True)
        else:
            rows.add("steps", {"value": 1.0})
        rows.add("epochs", {"value": 5.0})

        def handler(rows: Buffer = rows, last: dict[str, float] = last) -> None:
            last["other"] = 3.0
            rows.add("steps", last)
            rows.flush()

        reached = interrupted(rows.flush, at, handler)
        rows.add("steps", last)
        rows.flush()
        last["value"] = 4.0
        rows.add("steps", last)
        rows.close()
        assert store.appended == {"steps": [4.0] if known else [1.0, 4.0], "epochs": [5.0]}, at
        if not reached:
            break
    assert at > 100


def test_what_a_row_says_later_waits_for_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.01)
    store, row = Memory(), {"value": 1.0}
    rows = Buffer(store)
    rows.add("steps", row)
    rows.flush(wait=True)
    store.full, row["value"] = True, 2.0
    rows.add("steps", row)
    rows.flush(wait=True)
    rows.add("steps", {"value": 3.0})
    rows.flush(wait=True)
    assert store.appended == {"steps": [1.0]}
    store.full = False
    rows.close()
    assert store.appended == {"steps": [2.0, 3.0]}


@pytest.mark.parametrize("written", [False, True])
def test_a_row_that_says_more_is_missing_once(written: bool) -> None:
    """Beside a row of another node."""
    store, row = Memory(), {"value": 1.0}
    store.full, rows = not written, Buffer(store)
    rows.add("steps", row)
    rows.flush(wait=True)
    store.full = True
    rows.add("epochs", {"value": 5.0})
    rows.flush(wait=True)
    row["value"] = 2.0
    rows.add("steps", row)
    with pytest.warns(UserWarning, match="is incomplete: 2 rows"):
        rows.close()


@pytest.mark.parametrize("action", [ctrl_c, Buffer.close])
def test_closing_may_be_interrupted(action: Callable) -> None:
    for at in count(1):
        store = Memory()
        rows = Buffer(store)
        rows.add("steps", {"value": 1.0})
        try:
            reached = interrupted(rows.close, at, lambda rows=rows: action(rows))
        except KeyboardInterrupt:
            reached = True
            rows.close()
        assert (store.appended, store.committed, store.closed) == ({"steps": [1.0]}, 1, True), at
        if not reached:
            break
    assert at > 100


def test_rows_of_a_process_that_forked_are_written_once(tmp_path: Path) -> None:
    store = Memory()
    rows = Buffer(store)
    rows.add("steps", {"value": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, about threads and fork
        child = os.fork()
    if child == 0:  # what a loader's worker inherits: none of these calls waits for a thread that is not there
        rows.add("steps", {"value": 2.0})
        rows.coordinate("steps", "layer", "layer", np.array(["a"]))
        rows.flush(wait=True)
        rows.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    rows.close()
    assert store.appended == {"steps": [1.0]}
    assert not store.coordinates


def test_a_full_disk_is_tried_again_without_new_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "_RETRY_SECONDS", 0.01)
    store = Memory()
    store.full = True
    rows = Buffer(store)
    rows.add("steps", {"value": 1.0})
    rows.flush(wait=True)
    assert "No space left" in str(rows.failure)
    time.sleep(0.1)
    store.full = False
    while rows.failure is not None:
        time.sleep(1e-3)
    assert (store.appended, store.committed) == ({"steps": [1.0]}, 1)
    assert len(caplog.records) == 1
    rows.close()


def test_memory_is_bounded_when_the_disk_stays_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(buffer, "_BOUND", 10_000)
    store = Memory()
    store.full = True
    rows = Buffer(store)
    with pytest.warns(UserWarning, match=r"into run\.zarr stopped \(No space left on device\): training continues"):
        for step in range(100):  # 1000 bytes each
            rows.add("steps", {"value": torch.full((125,), float(step))})
            rows.flush(wait=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.ERROR]
    assert str(rows.failure) == "No space left on device"
    store.full = False
    with pytest.warns(UserWarning, match=r"run\.zarr is incomplete: \d+ rows since .* \(No space left") as said:
        rows.close()
    written = [row[0] for row in store.appended["steps"]]
    assert written == list(range(len(written)))  # no gap: what was kept, then nothing
    assert 10 <= len(written) <= 12
    assert f"incomplete: {100 - len(written)} rows" in str(said[0].message)


def test_a_disk_that_hangs_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "_BOUND", 10_000)
    store, hanging = Memory(), threading.Event()
    monkeypatch.setattr(store, "commit", lambda: hanging.wait(60))
    rows = Buffer(store)
    with pytest.warns(UserWarning, match="the disk cannot keep up"):
        for step in range(100):
            rows.add("steps", {"value": torch.full((125,), float(step))})
            rows.flush()
    hanging.set()
    with pytest.warns(UserWarning, match="is incomplete"):
        rows.close()


def test_what_is_on_the_disk_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "_BOUND", 10_000)
    store = Memory()
    rows = Buffer(store)
    for step in range(30):  # 1000 bytes each
        rows.add("steps", {"value": torch.full((125,), float(step))})
        rows.flush(wait=True)
    rows.close()
    assert [row[0] for row in store.appended["steps"]] == list(range(30))


def test_rows_that_do_not_fit_together_cost_the_record_not_the_training() -> None:
    store = Memory()
    rows = Buffer(store)
    rows.add("steps", {"value": 1.0})
    rows.flush()
    rows.add("steps", {"value": torch.zeros(2)})
    rows.add("steps", {"value": torch.zeros(3)})
    rows.add("steps", last := {"value": 2.0})
    with pytest.warns(UserWarning, match="stack expects each tensor to be equal size"):
        rows.flush()
    rows.add("steps", last)
    rows.add("steps", late := {"value": 3.0})
    rows.add("steps", late)
    with pytest.warns(UserWarning, match="is incomplete: 4 rows"):
        rows.close()
    rows.close()  # it is not said again
    assert store.appended == {"steps": [1.0]}


def test_variables_that_come_in_one_tensor_are_columns_of_their_own() -> None:
    together = {("value", "other"): torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    columns = arrays(stack([together, {"alone": 5.0}])[0])
    assert columns.keys() == {"value", "other", "alone"}
    np.testing.assert_array_equal(columns["value"], [[1.0, 2.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(columns["other"], [[3.0, 4.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(columns["alone"], [np.nan, 5.0])


def test_an_array_that_one_row_lacks_is_missing_there() -> None:
    columns = arrays(stack([{"value": np.array([1.0, 2.0])}, {"other": "text"}, {"value": np.array([3.0, 4.0])}])[0])
    np.testing.assert_array_equal(columns["value"], [[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    assert columns["other"].tolist() == ["", "text", ""]


def test_the_same_object_is_one_row_of_a_node() -> None:
    store = Memory()
    rows = Buffer(store)
    for value in (1.0, 2.0):
        row = {"value": value}
        for node in ("steps", "steps", "epochs"):
            rows.add(node, row)
        rows.flush(wait=True)
        rows.add("steps", row)
    rows.close()
    assert store.appended == {"steps": [1.0, 2.0], "epochs": [1.0, 2.0]}


def test_a_closed_buffer_takes_nothing_more() -> None:
    rows = Buffer(Memory())
    rows.close()
    rows.close()  # again: nothing happens
    with pytest.raises(ValueError, match=r"the record run\.zarr is closed: nothing more can be recorded in it"):
        rows.add("steps", {"value": 1.0})
