"""An experiment that was killed goes on: its record is the one of a run that was not, bit for bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xarray as xr
from experiments import few_digits

from dynamics import open_run
from dynamics.data import Data
from dynamics.experiments import checkpoint, running
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.running import run
from dynamics.experiments.sweep import sweep
from dynamics.record.store import Store

TINY = Experiment(
    width=0.05, rounds=2, epochs=(2, 1), learning_rates=(0.1, 0.01), sparsity=0.5, batch_size=32,
    importance_samples=64, probe_samples=32, curvature_every=2,
)  # fmt: skip
STEPS = 2  # in an epoch
CLOCKS = {"created", "resumed", "commit"}
METADATA = {".zattrs", ".zgroup", ".zmetadata", ".lock"}


class Interruption(BaseException):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def data() -> Data:
    return few_digits(64, 64)


def killed(experiment: Experiment, path: Path, data: Data, step: int) -> None:
    def report(done: int) -> None:
        if done == step:
            raise Interruption

    with pytest.raises(Interruption):
        run(experiment, path, data=data, progress=False, report=report)


def assert_same_records(one: Path, other: Path) -> None:
    """Equal in all but the clock."""
    left, right = open_run(one).load(), open_run(other).load()
    assert {name for name, node in left.subtree_with_keys} == {name for name, node in right.subtree_with_keys}
    for name, node in left.subtree_with_keys:
        drop = ["seconds"] if name == "epochs" else []
        xr.testing.assert_identical(
            node.to_dataset().drop_vars(drop).drop_attrs(), right[name].to_dataset().drop_vars(drop).drop_attrs()
        )
    assert {**left.attrs, **dict.fromkeys(CLOCKS)} == {**right.attrs, **dict.fromkeys(CLOCKS)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Path:
    """The record of TINY, never interrupted, in float64: a module's fixture is made before conftest sets it."""
    torch.set_default_dtype(torch.float64)
    return run(TINY, tmp_path_factory.mktemp("whole") / "run.zarr", data=data, progress=False)


@pytest.mark.long
@pytest.mark.parametrize("steps", [(1,), (2,), (4,), (1, 3, 3, 6)], ids=str)
def test_killed_at_any_step(tmp_path: Path, data: Data, whole: Path, steps: tuple[int, ...]) -> None:
    path = tmp_path / "run.zarr"
    for step in steps:
        killed(TINY, path, data, step)
        assert "finished" not in open_run(path).attrs
    counts: list[int] = []
    run(TINY, path, data=data, progress=False, report=counts.append)
    begun = (steps[-1] - 1) // STEPS * STEPS
    assert counts == list(range(begun, 3 * STEPS + 1))  # a kill costs one epoch
    assert_same_records(path, whole)


CHOSEN = {
    "none": {},
    "loss_preservation": {"keep_momentum": True},
    "gradient_norm_increase": {},
    "random": {"protocol": "reference"},
    "snip": {"granularity": "weight"},
}


@pytest.mark.long
@pytest.mark.parametrize("measure", CHOSEN)
def test_with_each_kind_of_measure(tmp_path: Path, data: Data, measure: str) -> None:
    chosen = replace(TINY, measure=measure, **CHOSEN[measure])
    killed(chosen, tmp_path / "killed.zarr", data, 3)
    for name in ("killed", "whole"):
        run(chosen, tmp_path / f"{name}.zarr", data=data, progress=False)
    assert_same_records(tmp_path / "killed.zarr", tmp_path / "whole.zarr")


PROGRAM = """
import os, signal, sys
import test_experiment_resumes as tests, torch
from dynamics.experiments import running
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
instant, kill = sys.argv[2], lambda *given: os.kill(os.getpid(), signal.SIGKILL)
if instant == "step":
    report = lambda done: kill() if done == 3 else None
else:
    report = lambda done: None
    module, name = {"checkpoint": (tests.checkpoint, "save"), "end": (running, "_finish")}[instant]
    setattr(module, name, kill)
tests.run(tests.TINY, sys.argv[1], data=tests.few_digits(64, 64), progress=False, report=report)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX has it")
@pytest.mark.parametrize("instant", ["step", "checkpoint", "end"])
def test_killed_by_a_signal(tmp_path: Path, data: Data, whole: Path, instant: str) -> None:
    path, here = tmp_path / "run.zarr", Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, path, instant], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    run(TINY, path, data=data, progress=False)
    assert_same_records(path, whole)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_record_is_left_as_it_is(data: Data, whole: Path) -> None:
    before = contents(whole)
    assert open_run(whole).attrs["finished"]
    assert checkpoint.load(whole) is None
    run(replace(TINY, device="cpu", download=True), whole, data=data, progress=False)
    assert contents(whole) == before


@pytest.mark.long
def test_a_finished_record_keeps_nothing_to_go_on_with(tmp_path: Path, data: Data, whole: Path) -> None:
    """θ₀ is as large as the network; what is left is what xarray reads, and a lock."""
    killed(TINY, path := tmp_path / "run.zarr", data, 3)
    assert {".checkpoint"} < {file.name for file in path.glob(".*")} - {*METADATA}
    run(TINY, path, data=data, progress=False)
    assert {file.name for file in path.glob(".*")} == {*METADATA}
    assert {file.name for file in whole.glob(".*")} == {*METADATA}
    assert_same_records(path, whole)


@pytest.mark.parametrize("again", ["run", "sweep"])
def test_what_a_process_left_that_was_killed_while_it_finished_goes_when_it_is_run_again(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    def interrupted(*given: object) -> None:
        raise Interruption

    short = replace(TINY, epochs=(1, 0), rounds=1, measure="none", curvature_every=0)
    path = tmp_path / f"{short.name}.zarr"
    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(Store, "drop_kept", interrupted)
        run(short, path, data=data, progress=False)
    assert open_run(path).attrs["finished"]
    assert {".checkpoint"} < {file.name for file in path.glob(".*")} - {*METADATA}
    if again == "run":
        run(short, path, data=data, progress=False)
    else:
        assert sweep([short], tmp_path, workers=0) == {}
    assert {file.name for file in path.glob(".*")} == {*METADATA}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("method", ["keep", "append"])  # of the training's own thread, and of the writer's
@pytest.mark.filterwarnings("ignore:.*run.zarr:UserWarning")
def test_a_full_disk_is_said_with_the_record_and_what_to_do(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    short = replace(TINY, epochs=(1, 0), rounds=1, measure="none", curvature_every=0)
    with monkeypatch.context() as patched:
        patched.setattr(Store, method, full)
        said = r"No space left on device, so .*run\.zarr is not finished: make room, and the same command continues it"
        with pytest.raises(OSError, match=said):
            run(short, tmp_path / "run.zarr", data=data, progress=False)
    run(short, tmp_path / "run.zarr", data=data, progress=False)
    assert open_run(tmp_path / "run.zarr").attrs["finished"]


def test_where_and_how_it_would_prune_make_no_other_experiment() -> None:
    none = replace(TINY, measure="none")
    assert replace(none, sparsity=0.9, rounds=1, root="elsewhere").identity == none.identity
    assert replace(none, seed=1).identity != none.identity
    assert replace(TINY, rounds=1).identity != TINY.identity


def test_another_experiment_is_refused_by_name(data: Data, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(
        FileExistsError, match=r"holds another experiment, with rounds 2, not 1, width 0.05, not 0.1; choose"
    ):
        run(replace(TINY, width=0.1, rounds=1), whole, data=data, progress=False)
    assert contents(whole) == before


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trapped",)


def test_a_checkpoint_runs_no_code(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    killed(TINY, tmp_path / "run.zarr", data, 3)
    with (tmp_path / "run.zarr" / ".checkpoint").open("wb") as file:
        torch.save({"epochs": Trap()}, file)
    with pytest.raises(ValueError, match=r"\.checkpoint cannot be read .* remove it to start the run anew"):
        run(TINY, tmp_path / "run.zarr", data=data, progress=False)
    assert not Path("trapped").exists()


@pytest.mark.long
def test_a_checkpoint_that_does_not_fit_its_record_is_refused(tmp_path: Path, data: Data) -> None:
    """Damaged; of a step that the record did not reach, as where a copy was made of both meanwhile; of another net."""
    path = tmp_path / "run.zarr"
    killed(TINY, path, data, 3)
    early = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    killed(TINY, path, data, 5)
    late = (path / ".checkpoint").read_bytes()
    flipped = bytearray(late)
    flipped[len(flipped) // 2] ^= 255
    shutil.rmtree(path)
    for file, content in early.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for content, said in (
        (late, r"is from step 4, but the record ends at step 3: copy both again, or remove .*checkpoint"),
        (bytes(flipped), "cannot be read .*checksum of .* is wrong"),
    ):
        (path / ".checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=said):
            run(TINY, path, data=data, progress=False)
    with (path / ".checkpoint").open("wb") as file:
        torch.save({"epochs": 1, "model": {}}, file)
    with pytest.raises(ValueError, match=r"from another training .* remove .* to start the run anew"):
        run(TINY, path, data=data, progress=False)
    assert open_run(path).steps.sizes["step"] == 3


@pytest.mark.long
def test_a_disk_that_is_full_costs_a_checkpoint(tmp_path: Path, data: Data, whole: Path, monkeypatch) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".checkpoint" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.warns(UserWarning, match=r"no checkpoint after epoch \d: .*No space left"):
            run(TINY, tmp_path / "run.zarr", data=data, progress=False)
    assert_same_records(tmp_path / "run.zarr", whole)


def test_one_process_at_a_time_runs_an_experiment(tmp_path: Path, data: Data, whole: Path, monkeypatch) -> None:
    path = tmp_path / "run.zarr"
    seen = []

    def report(steps: int) -> None:
        with pytest.raises(BlockingIOError, match="another process that runs the same experiment"):
            run(TINY, path, data=data, progress=False)
        seen.append(steps)

    run(TINY, path, data=data, progress=False, report=report)
    assert len(seen) == 3 * STEPS + 1
    assert [file.name for file in tmp_path.iterdir()] == ["run.zarr"]
    before, looks = contents(path), iter([False, True])  # between the two another process finished it
    monkeypatch.setattr(running, "is_finished", lambda *asked: next(looks))
    monkeypatch.setattr(running, "_run", lambda *asked, **how: pytest.fail("it is finished"))
    run(TINY, path, data=data, progress=False)
    assert contents(path) == before


def test_a_record_of_a_later_version_is_named_as_such(tmp_path: Path, data: Data) -> None:
    path = tmp_path / "run.zarr"
    killed(TINY, path, data, 1)
    store = Store.reopen(path)
    store.note("experiment", json.dumps(dataclasses.asdict(TINY) | {"invented": 1}))
    store.close()
    with pytest.raises(FileExistsError, match=r"this version does not know its experiment .*invented"):
        run(TINY, path, data=data, progress=False)


def test_lists_are_taken_for_tuples() -> None:
    assert replace(TINY, epochs=[2, 1], learning_rates=[0.1, 0.01]) == TINY
    assert hash(replace(TINY, epochs=[2, 1])) == hash(TINY)
