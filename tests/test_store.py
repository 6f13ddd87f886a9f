"""What is appended and committed comes back equal through plain xarray, whoever reads while it is written."""

import errno
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import plain_step, recorded, smooth_network, vectors

from dynamics import QUANTITIES, Recorder, RecordError, open_run
from dynamics.record import store
from dynamics.record.files import replace
from dynamics.record.store import Store

ATTRIBUTES = {"schema_version": 1}


def rows(start: int, stop: int) -> dict[str, np.ndarray]:
    index = np.arange(start, stop)
    return {
        "step": index,
        "loss": np.sqrt(index),
        "grad_sqnorm": index[:, None] + np.array([0.25, 0.5]),
    }


def read(path: Path) -> xr.Dataset:
    return xr.open_datatree(path)["steps"].to_dataset().load()


@pytest.mark.parametrize("block", [1, 3, 4, 7, 20])
def test_many_appends_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setitem(store._CHUNK_ROWS, "steps", 4)
    written = Store(tmp_path / "run.zarr", ATTRIBUTES)
    for start in range(0, 20, block):
        written.append("steps", rows(start, min(start + block, 20)))
        written.commit()
        assert read(tmp_path / "run.zarr").sizes["step"] == min(start + block, 20)
    found = read(tmp_path / "run.zarr")
    for name, values in rows(0, 20).items():
        np.testing.assert_array_equal(found[name], values)
    assert found.grad_sqnorm.dims == ("step", "layer")
    assert found.grad_sqnorm.attrs == QUANTITIES["grad_sqnorm"].attributes


def test_only_what_is_committed_is_seen(tmp_path: Path) -> None:
    written = Store(tmp_path / "run.zarr", ATTRIBUTES)
    written.append("steps", rows(0, 3))
    assert "step" not in read(tmp_path / "run.zarr").sizes
    written.commit()
    early = xr.open_datatree(tmp_path / "run.zarr")["steps"]
    written.append("steps", rows(3, 5))
    assert read(tmp_path / "run.zarr").step.values.tolist() == [0, 1, 2]
    written.commit()
    assert read(tmp_path / "run.zarr").step.values.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(early.loss, np.sqrt([0, 1, 2]))  # opened before, read after


def test_a_variable_that_comes_late_is_missing_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store._CHUNK_ROWS, "steps", 4)
    written = Store(tmp_path / "run.zarr", ATTRIBUTES)
    written.append("steps", rows(0, 6))
    written.append("steps", rows(6, 7) | {"late": np.array([1.5])})
    written.append("steps", {"step": np.array([7])})
    written.commit()
    found = read(tmp_path / "run.zarr")
    np.testing.assert_array_equal(found.late, [np.nan] * 6 + [1.5, np.nan])
    np.testing.assert_array_equal(found.loss, [*np.sqrt(np.arange(7)), np.nan])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("reopened", [False, True])
def test_the_last_row_is_amended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, reopened: bool) -> None:
    monkeypatch.setitem(store._CHUNK_ROWS, "steps", 4)
    written = Store(tmp_path / "run.zarr", ATTRIBUTES)
    written.append("steps", rows(0, length))
    written.commit()
    if reopened:
        written.close()
        written = Store.reopen(tmp_path / "run.zarr")
    written.amend("steps", {"loss": np.array([7.5]), "late": np.array([2.5])})
    written.commit()
    expected = rows(0, 9) | {"late": np.full(9, np.nan)}
    expected["loss"][length - 1], expected["late"][length - 1] = 7.5, 2.5
    for stop in (length, length + 1, 9):
        found = read(tmp_path / "run.zarr")
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values[:stop], err_msg=name)
        written.append("steps", rows(stop, 9 if stop > length else stop + 1))
        written.commit()


def test_an_existing_path_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run.zarr").mkdir()
    (tmp_path / "run.zarr" / "thesis.txt").write_text("mine")
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(FileExistsError, match=r"run\.zarr exists already: choose another path, .*, or continue it"):
        Recorder(tmp_path / "run.zarr", model, optimizer)
    assert [path.name for path in tmp_path.rglob("*")] == ["run.zarr", "thesis.txt"]
    assert not optimizer._optimizer_step_pre_hooks


def test_a_link_to_what_is_not_there_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run.zarr").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"run\.zarr is a link to .*nowhere, which is not there: choose"):
        Store(tmp_path / "run.zarr", {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("interrupted", ["write_bytes", "rename"])
def test_an_interruption_of_its_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, interrupted, interrupt)
    model = smooth_network()
    with pytest.raises(KeyboardInterrupt):
        Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1))
    assert not list(tmp_path.iterdir())


def test_a_record_opens_by_plain_xarray_alone(tmp_path: Path) -> None:
    model = smooth_network()
    recorded(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1), vectors(3), curvature_every=2)
    run = xr.open_datatree(tmp_path / "run.zarr")
    assert run["steps"].param_sqnorm.attrs["long_name"] == "‖θ‖²"
    assert run["steps"].param_sqnorm.dtype == np.float64
    assert run["curvature"].step.values.tolist() == [0, 2]
    for name in ("schema_version", "thetadot", "torch", "device", "created"):
        assert run.attrs[name]


def test_reading_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamics.record.buffer._ROWS", 2)
    model, batches = smooth_network(), vectors(60)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0) as recorder:
        for batch in recorder.watch(batches):
            plain_step(model, optimizer, batch)
            steps = xr.open_datatree(tmp_path / "run.zarr")["steps"]
            seen.append(steps.sizes.get("step", 0))
            if seen[-1]:
                assert np.isfinite(steps.grad_sqnorm.values).all()
    assert seen == sorted(seen)
    assert 0 < seen[-1] <= 60
    assert open_run(tmp_path / "run.zarr")["steps"].step.values.tolist() == list(range(60))


def test_each_write_may_fail_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store._CHUNK_ROWS, "steps", 4)
    until_failure = 0

    def failing(operation: Callable) -> Callable:
        def fails_in_its_turn(*arguments: object) -> object:
            nonlocal until_failure
            until_failure -= 1
            if until_failure <= 0:
                raise OSError("No space left on device")
            return operation(*arguments)

        return fails_in_its_turn

    written, layers, attempts = Store(tmp_path / "run.zarr", ATTRIBUTES), np.array(["first", "second"]), 0
    for name in ("write_bytes", "replace"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))
    for task in (
        lambda: written.write_coordinate("steps", "layer", "layer", layers),
        lambda: written.append("steps", rows(0, 3)),
        lambda: written.append("steps", rows(3, 5) | {"late": np.array([1.5, 2.5])}),
        written.commit,
    ):
        for number in count(1):  # the n-th attempt fails at its n-th operation, until there are fewer than n
            until_failure, attempts = number, attempts + 1
            try:
                task()
                break
            except OSError:
                pass
    monkeypatch.undo()
    found = read(tmp_path / "run.zarr")
    assert attempts > 2 * (1 + 3 + 2 * 4 + 1)  # each file is written, then renamed
    assert found.layer.values.tolist() == layers.tolist()
    np.testing.assert_array_equal(found.late, [np.nan] * 3 + [1.5, 2.5])
    for name, values in rows(0, 5).items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dims == (("step", "layer") if values.ndim == 2 else ("step",))


@pytest.mark.parametrize("apart", [False, True])
def test_a_whole_number_may_be_followed_by_a_fraction(tmp_path: Path, apart: bool) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        for accuracy, target in ((1, 0), (0.5, 0.25)):
            recorder.log_epoch(test_accuracy=accuracy)
            extra = {"seed": 7} if target else {}
            with recorder.event("look", probe=vectors(1), target=target, **extra):
                pass
            if apart:
                recorder.flush()
    run = open_run(tmp_path / "run.zarr")
    assert run["epochs"].test_accuracy.values.tolist() == [1, 0.5]
    assert run["pruning"].target.values.tolist() == [0, 0.25]
    np.testing.assert_array_equal(run["pruning"].seed, [np.nan, 7])
    assert run["pruning"].event.dtype == run["pruning"].step.dtype == run["epochs"].epoch.dtype == np.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_scalars_of_any_type_are_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            plain_step(model, optimizer, batch)
            if number != 1:
                recorder.log(logged=torch.tensor(1, dtype=dtype) if number else 0.0)
    np.testing.assert_array_equal(open_run(tmp_path / "run.zarr")["steps"].logged, [0, np.nan, 1, 1])


def test_a_network_in_bfloat16_is_recorded(tmp_path: Path) -> None:
    model = smooth_network().to(torch.bfloat16)
    batches = [(inputs.to(torch.bfloat16), labels) for inputs, labels in vectors(2)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = recorded(tmp_path / "run.zarr", model, optimizer, batches, curvature_every=0)["steps"]
    last = [sum(p.grad.double().square().sum().item() for p in model[index].parameters()) for index in (0, 2)]
    # A square of 8 bits is exact in float32; a block's 1024 terms are added in pairs: 10 roundings, 2⁻²⁴ each.
    np.testing.assert_allclose(steps.grad_sqnorm[-1], last, rtol=10 * 2**-24)


def test_what_cannot_be_written_is_never_lost_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(columns: object) -> None:
        raise TypeError("Got unsupported ScalarType")

    monkeypatch.setattr("dynamics.record.writer.arrays", broken)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lost = r"run\.zarr is incomplete: 3 rows since \d\d:\d\d:\d\d could not be written \(Got unsupported ScalarType\)"
    with pytest.warns(UserWarning, match=lost):
        recorded(tmp_path / "run.zarr", model, optimizer, vectors(2))


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system names none when a write fails."""

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        replace(tmp_path / "file", b"")


def test_a_closed_record_takes_nothing_more(tmp_path: Path) -> None:
    model = smooth_network()
    with Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        pass
    recorder.close()  # again: nothing happens
    with pytest.raises(ValueError, match=r"run\.zarr is closed: nothing more can be recorded in it"):
        recorder.log_epoch(test_accuracy=0.5)


def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dynamics.record.buffer._ROWS", 2)
    append, calls = Store.append, []

    def failing(self: Store, node: str, values: dict[str, np.ndarray]) -> None:
        calls.append(node)
        if 2 <= len(calls) <= 5:
            raise OSError("No space left on device")
        append(self, node, values)

    monkeypatch.setattr(Store, "append", failing)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = recorded(tmp_path / "run.zarr", model, optimizer, vectors(20), curvature_every=0)
    assert run["steps"].step.values.tolist() == list(range(20))
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, node: str, values: dict[str, np.ndarray]) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Store, "append", full)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"run\.zarr is incomplete: 4 rows since .* \(No space left on device\)"):
        recorded(tmp_path / "run.zarr", model, optimizer, vectors(3))
    assert not optimizer._optimizer_step_pre_hooks


def test_what_is_no_record_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no record at .*nowhere: give the path of a run"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecordError, match="folder is not a thetadot record") as caught:
        open_run(tmp_path / "folder")
    assert "\n" not in str(caught.value)
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(RecordError, match=r"file\.txt is not a thetadot record"):
        open_run(tmp_path / "file.txt")
    Store(tmp_path / "future", {"schema_version": 99})
    with pytest.raises(RecordError, match="has schema version 99, but this thetadot reads version 1: open it with"):
        open_run(tmp_path / "future")
    Store(tmp_path / "foreign", {})
    with pytest.raises(RecordError, match="has schema version none"):
        open_run(tmp_path / "foreign")


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError("No space left on device")

    replace(tmp_path / "file", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            replace(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks as POSIX has them")
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS is where nothing keeps its locks."""

    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=r"run\.zarr is on a file system without locks \(No locks available"):
        Store(tmp_path / "run.zarr", {"schema_version": 1})


def test_a_coordinate_stays_as_it_was_first_written(tmp_path: Path) -> None:
    """It is a coordinate to xarray, too, though it has not its dimension's name; and a record may have any name."""
    written = Store(tmp_path / "run.zip", ATTRIBUTES)
    written.write_coordinate("units", "layer", "unit", np.array(["a", "b"]))
    written.append("units", {"event": np.array([0]), "alive": np.array([[True, False]])})
    with pytest.raises(ValueError, match=r"coordinate 'layer' of /units changed, but a record's units are fixed"):
        written.write_coordinate("units", "layer", "unit", np.array(["a", "c"]))
    written.commit()
    written.close()
    found = open_run(tmp_path / "run.zip")["units"].to_dataset()
    assert found.coords["layer"].values.tolist() == ["a", "b"]
