"""A record that is closed, killed or rewound is gone on with as if it had never been left; one writer at a time."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from dynamics import RecordError, open_run
from dynamics.record import store
from dynamics.record.store import Store
from dynamics.schema import NODES

ATTRIBUTES = {"schema_version": 1}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store._CHUNK_ROWS, "steps", 4)
    monkeypatch.setitem(store._CHUNK_ROWS, "curvature", 2)


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    index = np.arange(start, stop)
    return {"step": index, "loss": np.sqrt(index), "grad_sqnorm": index[:, None] + np.array([0.25, 0.5])}


def assert_holds(path: Path, node: str, length: int) -> None:
    """Plain xarray finds exactly the first rows."""
    found = xr.open_datatree(path)[node].to_dataset().load()
    assert found.sizes["step"] == length
    for name, values in rows(0, length).items():
        np.testing.assert_array_equal(found[name], values)


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("length", range(10))
def test_going_on_equals_never_having_stopped(tmp_path: Path, length: int) -> None:
    layers = np.array(["first", "second"])
    written = {name: Store(tmp_path / name, ATTRIBUTES) for name in ("once.zarr", "twice.zarr")}
    for name, target in written.items():
        target.write_coordinate("steps", "layer", "layer", layers)
        if length:
            target.append("steps", rows(0, length))
        target.commit()
        if name == "twice.zarr":
            target.close()
            target = Store.reopen(tmp_path / name)
            assert target.lengths == dict.fromkeys(NODES, 0) | {"steps": length}
            target.write_coordinate("steps", "layer", "layer", layers)
        target.append("steps", rows(length, 10))
        target.commit()
        target.close()
        assert_holds(tmp_path / name, "steps", 10)
    assert files(tmp_path / "once.zarr") == files(tmp_path / "twice.zarr")


def test_what_was_not_committed_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    first = Store(path, ATTRIBUTES)
    first.append("steps", rows(0, 6))
    first.commit()
    first.append("steps", {**rows(6, 30), "late": np.arange(24.0)})
    first.write_coordinate("steps", "layer", "layer", np.array(["a", "b"]))
    first.append("curvature", rows(0, 3))
    first._lock.release()  # as the system does when a process dies
    (path / ".start.npy.partial").write_bytes(b"half")
    (path / "steps" / "loss" / ".0.partial").write_bytes(b"half")
    again = Store.reopen(path)
    assert (again.lengths["steps"], again.lengths["curvature"]) == (6, 0)
    assert sorted(os.listdir(path / "steps")) == [".zattrs", ".zgroup", "grad_sqnorm", "loss", "step"]
    assert sorted(os.listdir(path / "steps" / "loss")) == [".zarray", ".zattrs", "0", "1"]
    assert not list(path.rglob("*.partial"))
    again.append("steps", rows(6, 9))
    again.commit()
    assert_holds(path, "steps", 9)
    assert "late" not in open_run(path)["steps"]


def test_a_variable_keeps_its_type(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    first = Store(path, ATTRIBUTES)
    first.append("steps", {"step": np.arange(2), "value": np.array([1, 2], np.float32), "text": np.array(["a", "bc"])})
    first.commit()
    first.close()
    again = Store.reopen(path)
    again.append("steps", {"step": np.arange(2, 4), "value": np.array([0.1, 2]), "text": np.array(["longer", "x"])})
    again.commit()
    found = xr.open_datatree(path)["steps"].to_dataset().load()
    assert found.value.dtype == np.float32
    np.testing.assert_array_equal(found.value, np.array([1, 2, 0.1, 2], np.float32))
    assert found.text.values.tolist() == ["a", "bc", "lo", "x"]


@pytest.mark.parametrize("keep", range(10))
def test_a_record_is_taken_back_to_any_length(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "run.zarr"
    target = Store(path, ATTRIBUTES)
    target.append("steps", rows(0, 9))
    target.append("curvature", rows(0, 9))
    target.commit()
    target.truncate({"steps": keep, "curvature": keep // 2})
    assert_holds(path, "steps", keep)
    assert_holds(path, "curvature", keep // 2)
    assert (target.lengths["steps"], target.lengths["curvature"]) == (keep, keep // 2)
    target.close()
    assert len(list((path / "steps" / "loss").glob("[0-9]*"))) == -(-keep // 4)
    target = Store.reopen(path)
    target.append("steps", rows(keep, 11))
    target.commit()
    assert_holds(path, "steps", 11)
    np.testing.assert_array_equal(target.read("steps", "loss"), np.sqrt(np.arange(11)))


def test_a_full_disk_takes_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 9))
    target.append("curvature", rows(0, 9))
    target.commit()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left on device"):
            target.truncate({"steps": 5, "curvature": 3})
    target.append("steps", rows(9, 11))
    target.commit()
    assert_holds(tmp_path / "run.zarr", "steps", 11)
    assert_holds(tmp_path / "run.zarr", "curvature", 9)


def test_whoever_opened_a_record_before_it_was_taken_back_may_read_it_then(tmp_path: Path) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 9))
    target.commit()
    early = xr.open_datatree(tmp_path / "run.zarr")["steps"]
    target.truncate({"steps": 2})
    np.testing.assert_array_equal(early.loss, np.sqrt(np.arange(9)))
    target.append("steps", rows(2, 3))
    target.commit()
    assert_holds(tmp_path / "run.zarr", "steps", 3)


def test_a_record_that_is_removed_meanwhile_does_not_come_back(tmp_path: Path) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 9))
    target.commit()
    shutil.rmtree(tmp_path / "run.zarr")
    with pytest.raises(FileNotFoundError):
        target.append("steps", rows(9, 10))
    target.close()
    assert not (tmp_path / "run.zarr").exists()


def test_a_record_that_was_removed_leaves_the_next_at_its_place_alone(tmp_path: Path) -> None:
    """A notebook's cell may have left a recorder open, and is run again in a folder that was removed."""
    first = Store(tmp_path / "run.zarr", ATTRIBUTES)
    first.append("steps", rows(0, 9))
    shutil.rmtree(tmp_path / "run.zarr")
    second = Store(tmp_path / "run.zarr", ATTRIBUTES)
    second.append("steps", rows(0, 3))
    for write in (first.commit, lambda: first.append("steps", rows(9, 10))):
        with pytest.raises(FileNotFoundError, match="the record was removed, and"):
            write()
    first.close()
    second.commit()
    second.close()
    assert open_run(tmp_path / "run.zarr")["steps"].sizes["step"] == 3


def test_nothing_can_be_kept_that_is_not_there(tmp_path: Path) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 3))
    with pytest.raises(ValueError, match=r"cannot keep 4 rows of /steps in .*run\.zarr: it has 3"):
        target.truncate({"steps": 4})
    with pytest.raises(ValueError, match="cannot keep -1 rows"):
        target.truncate({"steps": -1})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    first = Store(path, ATTRIBUTES)
    with pytest.raises(
        BlockingIOError, match=r"run\.zarr is being written by another recorder: close that one"
    ) as said:
        Store.reopen(path)
    assert "\n" not in str(said.value)
    program = "import sys; from dynamics.record.store import Store; Store.reopen(sys.argv[1])"
    command = [sys.executable, "-c", program, path]
    root = Path(__file__).parents[1]
    assert "BlockingIOError" in subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stderr
    with pytest.raises(FileExistsError, match=r"run\.zarr exists already"):
        Store(path, ATTRIBUTES)
    first.close()
    Store.reopen(path).close()
    assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0


def test_a_dropped_store_lets_the_next_writer_in(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    Store(path, ATTRIBUTES)
    Store.reopen(path)


def test_what_could_not_be_opened_may_be_opened_once_it_is_mended(tmp_path: Path) -> None:
    """Also while what was raised is still at hand, as in a notebook."""
    path = tmp_path / "run.zarr"
    target = Store(path, ATTRIBUTES)
    target.append("steps", rows(0, 3))
    target.commit()
    target.close()
    chunk = path / "steps" / "loss" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:4] + bytes(4) + whole[8:])
    with pytest.raises(RecordError, match="is damaged") as said:
        Store.reopen(path)
    chunk.write_bytes(whole)
    Store.reopen(path).close()
    assert said.value.__traceback__ is not None


FORKING = """
import gc, os, signal, sys, time
from dynamics.record.store import Store

store = Store(sys.argv[1], {"schema_version": 1})
if os.fork() == 0:  # as a loader's worker
    del store
    gc.collect()
    print("forked", flush=True)
    time.sleep(20)
    os._exit(0)
time.sleep(20)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_opens_the_lock_nor_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    program = [sys.executable, "-c", FORKING, path]
    options = {"cwd": Path(__file__).parents[1], "start_new_session": True, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, **options) as writer:
        assert writer.stdout.readline() == b"forked\n"
        with pytest.raises(BlockingIOError, match="is being written by another recorder"):
            Store.reopen(path)
        writer.kill()
        writer.wait()
        Store.reopen(path).close()  # while the forked process lives on
        os.killpg(writer.pid, signal.SIGKILL)


def test_going_on_needs_a_record(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    for name, reason in {"thesis": "thesis is not a thetadot record", "nowhere": "no record at .*nowhere"}.items():
        with pytest.raises(RecordError, match=reason):
            Store.reopen(tmp_path / name)
    assert files(tmp_path) == {"thesis/chapter.txt": b"mine"}


def test_notes_and_kept_arrays(tmp_path: Path) -> None:
    path, start = tmp_path / "run.zarr", np.linspace(0, 1, 5)
    target = Store(path, ATTRIBUTES)
    target.append("steps", rows(0, 3))
    target.commit()
    assert target.kept("start") is None
    target.keep("start", start)
    target.note("resumes", [{"step": np.int64(3), "kept": np.float64(0.5)}])
    target.note("resumes", [*target.attributes["resumes"], {"step": 4}])
    target.close()
    assert xr.open_datatree(path).attrs == {**ATTRIBUTES, "resumes": [{"step": 3, "kept": 0.5}, {"step": 4}]}
    assert set(xr.open_datatree(path)["steps"].variables) == {"step", "loss", "grad_sqnorm"}
    again = Store.reopen(path)
    np.testing.assert_array_equal(again.kept("start"), start)
    assert again.attributes["resumes"][1] == {"step": 4}
    with pytest.raises(
        TypeError, match="an attribute of a record must be a number, a string or a list of these, got PosixPath"
    ):
        again.note("path", path)
    again.commit()
    assert "path" not in open_run(path).attrs
    with pytest.raises(TypeError, match="an attribute of a record must be"):
        Store(tmp_path / "other.zarr", {"path": path})
    assert os.listdir(tmp_path) == ["run.zarr"]


def test_rows_must_have_the_shape_of_those_before(tmp_path: Path) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 3))
    with pytest.raises(ValueError, match=r"a row of /steps/grad_sqnorm has shape \(2,\), got \(3,\)"):
        target.append("steps", {"step": np.array([3]), "grad_sqnorm": np.zeros((1, 3))})
    with pytest.raises(ValueError, match=r"a variable's name becomes a folder .* got '\.\./loss'"):
        target.append("steps", {"step": np.array([3]), "../loss": np.zeros(1)})
    target.append("steps", rows(3, 4))
    target.commit()
    assert_holds(tmp_path / "run.zarr", "steps", 4)


def test_a_copy_without_its_lock_is_a_record(tmp_path: Path) -> None:
    target = Store(tmp_path / "run.zarr", ATTRIBUTES)
    target.append("steps", rows(0, 5))
    target.commit()
    shutil.copytree(tmp_path / "run.zarr", tmp_path / "copy.zarr", ignore=shutil.ignore_patterns(".lock"))
    again = Store.reopen(tmp_path / "copy.zarr")
    again.append("steps", rows(5, 6))
    again.commit()
    assert_holds(tmp_path / "copy.zarr", "steps", 6)
