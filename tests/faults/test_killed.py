"""Writers are killed, at random and at each of their file operations: no committed step is lost, every open succeeds.

``THETADOT_KILLS`` says how often at random; ``make faults`` kills more often.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import writers
import xarray as xr

from dynamics.record.store import Store

KILLS = int(os.environ.get("THETADOT_KILLS", "8"))
_KILLS_OF_A_RECORD = 20  # after each the whole record is compared: one of a hundred kills would take minutes to read


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that start at once: one with everything imported forks them."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parents[1])]))  # where the preloaded are found
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["writers", "pytest"])
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    return context


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for node, chunk in (("steps", 16), ("curvature", 8)):
        monkeypatch.setitem(writers.store._CHUNK_ROWS, node, chunk)


def steps(path: Path) -> int:
    """Open by plain xarray, load everything, compare everything; returns how many steps there are."""
    run = xr.open_datatree(path, engine="zarr").load()
    length = run["steps"].sizes.get("step", 0)
    expected = {"steps": writers.rows(0, length), "curvature": writers.halved(writers.rows(0, length))}
    for node, variables in expected.items():
        for name in run[node].variables if length else ():
            np.testing.assert_array_equal(run[node][name], variables[name])
    assert run["curvature"].sizes.get("step", 0) == -(-length // 2)  # a consistent cut
    return length


class Reader(threading.Thread):
    """Opens and reads the record all the while; keeps what went wrong."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ends, self.lengths, self.failures = path, threading.Event(), [0], []

    def run(self) -> None:
        while not self.ends.is_set():
            try:
                if self.path.exists():
                    self.lengths.append(steps(self.path))
            except Exception as error:
                self.failures.append(error)
            time.sleep(1e-3)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ends.set()
        self.join()


@pytest.mark.parametrize("first", range(0, KILLS, _KILLS_OF_A_RECORD))
@pytest.mark.parametrize("program", sorted(writers.PROGRAMS))
def test_killed_at_any_time(
    tmp_path: Path, processes: multiprocessing.context.BaseContext, program: str, first: int
) -> None:
    path, random, committed = tmp_path / "run.zarr", np.random.default_rng([KILLS, first]), 0
    with Reader(path) as reader:
        for kill in range(first, min(first + _KILLS_OF_A_RECORD, KILLS)):
            ours, theirs = processes.Pipe(duplex=False)
            writer = processes.Process(target=writers.PROGRAMS[program], args=(path, theirs, kill), daemon=True)
            writer.start()
            theirs.close()
            if kill > first:  # the first may also be killed before it has made the record
                assert ours.recv() == committed  # gone on with where it was left
            time.sleep(random.uniform(0, 0.1))
            writer.kill()
            writer.join()
            acknowledged = _last(ours, committed)
            assert writer.exitcode == -signal.SIGKILL
            if path.exists():
                committed = steps(path)
            assert committed >= acknowledged
    assert not reader.failures, reader.failures[:3]
    assert reader.lengths == sorted(reader.lengths)
    again = writers.opened(path)
    writers.append(again, committed, committed + 50)
    again.close()
    assert steps(path) == committed + 50 > 50


def _last(acknowledged: multiprocessing.connection.Connection, before: int) -> int:
    """What the writer said last."""
    try:
        while True:
            before = acknowledged.recv()
    except (EOFError, OSError):
        return before


def killed_at_each_operation(
    processes: multiprocessing.context.BaseContext, target: Callable, prepare: Callable[[], Path], half: bool
) -> Iterator[Path]:
    """The record after the writer was killed at its first file operation, its second, ..., and once not at all."""
    for operation in range(1, 10_000):
        path = prepare()
        writer = processes.Process(target=target, args=(path, operation, half), daemon=True)
        writer.start()
        writer.join()
        assert writer.exitcode in (0, -signal.SIGKILL)
        yield path
        if writer.exitcode == 0:
            assert operation > 10
            return


def found(path: Path) -> dict[str, np.ndarray]:
    run = xr.open_datatree(path, engine="zarr").load()
    assert set(run["steps"].variables) == set(run["curvature"].variables) == {"step", "loss", "grad_sqnorm"}
    everything = {name: run["steps"][name].values for name in run["steps"].variables}
    for name, values in writers.halved(everything).items():
        np.testing.assert_array_equal(run["curvature"][name], values)
    return everything


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("half", [pytest.param(False, marks=pytest.mark.long), True])
def test_killed_at_each_file_operation(
    tmp_path: Path, processes: multiprocessing.context.BaseContext, half: bool
) -> None:
    template, path, states = tmp_path / "template.zarr", tmp_path / "run.zarr", []
    before = writers.opened(template)
    writers.append(before, 0, 20)
    before.append("steps", {**writers.rows(20, 60), "late": np.zeros(40)})  # never committed
    before._lock.release()

    def prepare() -> Path:
        shutil.rmtree(path, ignore_errors=True)
        return Path(shutil.copytree(template, path))

    snapshots = writers.snapshots()
    for killed in killed_at_each_operation(processes, writers.go_on, prepare, half):
        state = found(killed)
        states += [number for number, snapshot in enumerate(snapshots) if equal(state, snapshot)]
        again = Store.reopen(killed)
        length = again.lengths["steps"]
        assert equal(found(killed), state)
        writers.append(again, length, length + 20, generation=2)
        again.close()
        expected = {
            name: np.concatenate([values, writers.rows(length, length + 20, generation=2)[name]])
            for name, values in state.items()
        }
        assert equal(found(killed), expected)
    assert states == sorted(states)  # each kill left one of the states, later kills later ones
    assert set(states) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("half", [False, True])
def test_killed_while_the_record_is_made(
    tmp_path: Path, processes: multiprocessing.context.BaseContext, half: bool
) -> None:
    path, made = tmp_path / "run.zarr", []

    def prepare() -> Path:
        shutil.rmtree(path, ignore_errors=True)
        return path

    for killed in killed_at_each_operation(processes, writers.create, prepare, half):
        made.append(killed.exists())
        again = writers.opened(killed)
        writers.append(again, 0, 20)
        again.close()
        assert equal(found(killed), writers.rows(0, 20))
    assert made == sorted(made)


@pytest.mark.parametrize("freed", [True, False])
def test_no_file_can_grow_for_a_while(
    tmp_path: Path, processes: multiprocessing.context.BaseContext, freed: bool
) -> None:
    path = tmp_path / "run.zarr"
    ours, theirs = processes.Pipe()
    writer = processes.Process(target=writers.fill_the_disk, args=(path, theirs), daemon=True)
    writer.start()
    assert "File too large" in ours.recv()
    loss = xr.open_datatree(path)["steps"].loss
    np.testing.assert_array_equal(loss, writers.rows(0, 20)["loss"])
    if freed:
        ours.send("go on")
        assert ours.recv() == "written"
    writer.kill()
    writer.join()
    np.testing.assert_array_equal(xr.open_datatree(path)["steps"].loss, writers.rows(0, 40 if freed else 20)["loss"])
    Store.reopen(path).close()
