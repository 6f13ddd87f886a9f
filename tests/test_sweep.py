"""A sweep records each experiment of its grid once, whatever happens to its workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dask
import pytest
import torch
import yaml
from distributed import Client, LocalCluster
from test_experiment_resumes import assert_same_records, contents

from dynamics import open_run
from dynamics.__main__ import main
from dynamics.experiments import checkpoint, workers
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.grid import grid
from dynamics.experiments.running import run
from dynamics.experiments.sweep import sweep

TINY = Experiment(
    width=0.05, rounds=1, epochs=(3,), learning_rates=(0.1,), sparsity=0.5, batch_size=32, train_samples=60,
    importance_samples=60, probe_samples=32, curvature_every=2,
)  # fmt: skip
DIVERGING = replace(TINY, learning_rates=(1e30,), seed=9)
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are killed as POSIX has it"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:‖g‖² of .* is not finite at step"),  # of what diverges
]


@pytest.fixture(autouse=True)
def _as_workers_do() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Two worker processes; whoever dies with a run is to blame at once."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as cluster,
    ):
        yield cluster.scheduler_address


def arm(fuse: Path) -> None:
    """Have the first process that has done two epochs of a run die before its checkpoint, once."""
    save = checkpoint.save

    def save_or_die(record: Path, state: dict) -> None:
        if state["epochs"] == 2:
            with contextlib.suppress(FileExistsError):  # the other process may be here at the same instant
                fuse.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        save(record, state)

    checkpoint.save = save_or_die


def test_a_grid_is_the_product_of_its_lists() -> None:
    experiments = grid({"measure": ["none", "magnitude"], "seed": [0, 1], "epochs": [2, 1], "learning_rates": [1, 0.1],
                        "rounds": 1})  # fmt: skip
    assert [(e.measure, e.seed) for e in experiments] == [("none", 0), ("none", 1), ("magnitude", 0), ("magnitude", 1)]
    assert all(e.epochs == (2, 1) for e in experiments)


def test_what_computes_the_same_is_one_experiment() -> None:
    experiments = grid({"measure": ["none", "magnitude"], "rounds": [1, 5], "sparsity": [0.5, 0.75]})
    assert [(e.measure, e.rounds, e.sparsity) for e in experiments] == [
        ("none", 1, 0.5), ("magnitude", 1, 0.5), ("magnitude", 1, 0.75), ("magnitude", 5, 0.5), ("magnitude", 5, 0.75),
    ]  # fmt: skip


def test_several_grids_share_what_they_have_in_common() -> None:
    experiments = grid(
        {"seed": [0, 1], "grids": [{"model": "vgg13", "width": 0.125}, {"model": "resnet56", "seed": 2}]}
    )
    assert [(e.model, e.width, e.seed) for e in experiments] == [
        ("vgg13", 0.125, 0), ("vgg13", 0.125, 1), ("resnet56", 1.0, 2),
    ]  # fmt: skip


def test_what_is_listed_first_varies_slowest_over_all_grids() -> None:
    configuration = {"seed": [0, 1], "epochs": [9], "rounds": [2, 3], "learning_rates": [0.1]}
    experiments = grid({**configuration, "grids": [{"model": "vgg13"}, {"model": "resnet56", "rounds": 5}]})
    assert [(e.seed, e.model, e.rounds) for e in experiments] == [
        (0, "vgg13", 2), (0, "vgg13", 3), (0, "resnet56", 5), (1, "vgg13", 2), (1, "vgg13", 3), (1, "resnet56", 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"colour": "red"}, "unknown settings colour: an experiment has model, data"),
        ({"measure": []}, "measure is an empty list: give at least one value"),
        ({"epochs": 3}, "epochs must be a list of whole numbers, got 3"),
        ({"grids": {"model": "vgg13"}}, "grids must be a list of settings like `- model: vgg13`, got {'model'"),
        ({"grids": []}, r"grids must be a list of settings like `- model: vgg13`, got \[\]"),
        ({"grids": [{"colour": "red"}]}, "unknown settings colour"),
        ({"seed": [0, [1, 2]]}, r"seed must be a whole number, got \[1, 2\]"),
        ({"grids": [{"seed": [0, [1, 2]]}]}, r"seed must be a whole number, got \[1, 2\]"),
    ],
)
def test_an_impossible_grid_is_refused(configuration: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(configuration)


def test_nothing_runs_where_not_all_could(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        sweep([TINY, replace(TINY, device="abacus", seed=1)], tmp_path)
    with pytest.raises(ValueError, match="would write the same record"):
        sweep([TINY, replace(TINY, width=0.1)], tmp_path)
    with pytest.raises(ValueError, match="one experiment twice would write the same record"):
        sweep([TINY, replace(TINY, device="cpu")], tmp_path)
    (tmp_path / f"{TINY.name}.zarr").mkdir()
    with pytest.raises(FileExistsError, match=r"exists already, and is not a .* choose another path"):
        sweep([replace(TINY, seed=1), TINY], tmp_path)
    assert not list((tmp_path / f"{TINY.name}.zarr").iterdir())


def test_a_scheduler_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "100ms"}):
        with pytest.raises(OSError, match=r"no scheduler answers at tcp://127.0.0.1:1: give the address that `dask"):
            sweep([TINY], tmp_path, scheduler="tcp://127.0.0.1:1")
        with pytest.raises(OSError, match="no scheduler answers at there: give the address"):
            sweep([TINY], tmp_path, scheduler="there")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_a_worker_that_dies_while_it_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "grid.yaml", TINY.identity)
    with dask.config.set({"distributed.worker.preload": ["import os; os._exit(9)"]}):
        assert main(["sweep", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: one of 1 workers died while starting, perhaps for lack of memory")
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is named, in a line; Dask's own log has nothing to add."""
    said = []
    listening = logging.Handler()
    listening.emit = said.append
    where = tmp_path / "scheduler.json"
    command = ["-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(where)]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL) as process:
        while not where.exists():
            assert process.poll() is None
            time.sleep(0.01)
        address = json.loads(where.read_text())["address"]
        as_completed = workers.as_completed

        def kill_first(futures: list) -> object:
            process.kill()
            return as_completed(futures)

        monkeypatch.setattr(workers, "as_completed", kill_first)
        logging.getLogger("distributed.client").addHandler(listening)
        try:
            failed = sweep([TINY, replace(TINY, seed=1)], tmp_path / "swept", scheduler=address)
        finally:
            logging.getLogger("distributed.client").removeHandler(listening)
    assert set(failed.values()) == {"the scheduler lost this run"}
    assert len(failed) == 2
    assert [record.getMessage() for record in said] == []


@pytest.mark.long
def test_the_same_in_this_process_and_on_workers(tmp_path: Path, scheduler: str) -> None:
    experiments = [TINY, replace(TINY, measure="none")]
    assert sweep(experiments, tmp_path / "here", workers=0) == {}
    assert sweep(experiments, tmp_path / "there", scheduler=scheduler) == {}
    for experiment in experiments:
        assert_same_records(*(tmp_path / place / f"{experiment.name}.zarr" for place in ("here", "there")))


def test_what_is_recorded_is_left_as_it_is(tmp_path: Path) -> None:
    assert sweep([TINY], tmp_path, workers=0) == {}
    before = contents(tmp_path)
    assert sweep([TINY, replace(TINY, seed=1)], tmp_path, workers=0) == {}
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_recorded_may_lie_where_nobody_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep([TINY], tmp_path, workers=0) == {}
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert sweep([TINY], tmp_path, workers=0) == {}
    with pytest.raises(PermissionError, match="you may not write into"):
        sweep([TINY, replace(TINY, seed=1)], tmp_path, workers=0)


@pytest.mark.long
def test_a_killed_worker_costs_an_epoch(tmp_path: Path, scheduler: str) -> None:
    with Client(scheduler) as client:
        client.run(arm, tmp_path / "fuse")
    failed = sweep([TINY, replace(TINY, seed=1)], tmp_path / "swept", scheduler=scheduler)
    assert (tmp_path / "fuse").exists()
    assert failed == {}
    resumed = []
    for experiment in (TINY, replace(TINY, seed=1)):
        path = tmp_path / "swept" / f"{experiment.name}.zarr"
        resumed += [trace["step"] for trace in open_run(path).attrs.get("resumed", [])]
        assert_same_records(path, run(experiment, tmp_path / f"{experiment.seed}.zarr", progress=False))
    assert resumed == [2]  # the second of three epochs was lost


@pytest.mark.long
def test_a_run_that_fails_stops_no_other(tmp_path: Path, scheduler: str) -> None:
    failed = sweep([DIVERGING, TINY], tmp_path, scheduler=scheduler)
    assert list(failed) == [DIVERGING.name]
    assert "the training diverged in epoch 1" in failed[DIVERGING.name]
    assert open_run(tmp_path / f"{TINY.name}.zarr").attrs["finished"]
    assert "finished" not in open_run(tmp_path / f"{DIVERGING.name}.zarr").attrs


def write(path: Path, settings: dict) -> None:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))


def test_the_command_line_says_what_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    varied = [{"learning_rates": [0.1]}, {"learning_rates": [1e30], "seed": 9}]
    write(tmp_path / "grid.yaml", {**TINY.identity, "grids": varied})
    assert main(["sweep", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "out"), "--workers", "0"]) == 1
    shown = capsys.readouterr()
    assert "recorded 1 run in" in shown.out
    assert f"failed: {DIVERGING.name}: the training diverged in epoch 1" in shown.err
    assert "100%" not in shown.err.splitlines()[-1]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_what_failed_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], by: signal.Signals
) -> None:
    def interrupted(experiment: Experiment, *args: object, **kwargs: object) -> None:
        if experiment.seed == 1 and by == signal.SIGTERM:
            signal.raise_signal(by)
        if experiment.seed == 1:
            raise KeyboardInterrupt  # dask_jobqueue, which another test imports, has a handler of its own
        raise torch.OutOfMemoryError("no memory")

    handler = signal.getsignal(signal.SIGTERM)

    monkeypatch.setattr(workers, "run", interrupted)
    write(tmp_path / "grid.yaml", {**TINY.identity, "seed": [0, 1, 2]})
    assert main(["sweep", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "out"), "--workers", "0"]) == 128 + by
    assert signal.getsignal(signal.SIGTERM) == handler
    *_, failed, last = capsys.readouterr().err.splitlines()
    assert failed == f"failed: {TINY.name}: OutOfMemoryError: no memory"
    assert last.startswith("interrupted")


@pytest.mark.long
def test_interrupted_it_goes_on_later(tmp_path: Path) -> None:
    """Ctrl-C in a terminal: all processes get the signal; as by default, the runs are on new ones."""
    long = replace(TINY, epochs=(40,))
    write(tmp_path / "grid.yaml", long.identity)
    command = [sys.executable, "-m", "dynamics", "sweep", str(tmp_path / "grid.yaml"), "-o", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a script's shell began these tests
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        signal.signal(signal.SIGINT, before)
        path = tmp_path / f"{long.name}.zarr"
        while checkpoint.saved_at(path) is None:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "interrupted; what was recorded so far is kept, and the same command continues it" in said.splitlines()
    assert "Traceback" not in said
    assert 0 < open_run(path)["epochs"].sizes["epoch"] < 40


@pytest.mark.long
def test_workers_keep_the_memory_they_use_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's threshold for giving it back makes a training twice as slow on a processor."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)  # another cluster of this process leaves its own here
    with workers.connected({TINY: Path("out")}, workers=1, scheduler=None) as client:
        (found,) = client.run(os.getenv, "MALLOC_TRIM_THRESHOLD_").values()
    assert found is None


def test_runs_find_the_data_of_the_sweep_whatever_folder_their_worker_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    submitted = []
    client = SimpleNamespace(
        submit=lambda task, experiment, *more, **how: submitted.append(experiment.root) or Given(""),
        subscribe_topic=lambda *given: None,
    )
    monkeypatch.setattr(workers, "as_completed", Futures)
    runs = {replace(TINY, root="data", seed=1): tmp_path, replace(TINY, root="/data", seed=2): tmp_path, TINY: tmp_path}
    assert [error for _, error in workers.on_dask(client, runs, print)] == [""] * 3
    assert submitted == [str(tmp_path / "data"), "/data", None]


def test_it_says_that_it_waits_for_workers(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as cluster,
        workers.connected({TINY: Path("out")}, workers=None, scheduler=cluster.scheduler_address),
    ):
        said = capsys.readouterr().err
    assert f"has no worker yet; runs wait for one: `dask worker {cluster.scheduler_address} --nthr" in said


def test_each_worker_has_a_gpu_of_its_own() -> None:
    assert [workers._placed(TINY, name, 2).device for name in (0, 1, 2)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert workers._placed(TINY, 1, 1) == workers._placed(TINY, "tcp://10.0.0.1:1", 2) == TINY  # it sees one, its own
    chosen = replace(TINY, device="cuda:1")
    assert workers._placed(chosen, 0, 2) == chosen


def test_a_run_waits_for_a_worker_that_is_being_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*asked: object, **how: object) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise BlockingIOError("is being written")

    tries: list[int] = []
    monkeypatch.setattr(workers, "run", busy)
    monkeypatch.setattr(workers, "data_of", lambda *name: None)
    monkeypatch.setattr(workers, "_SECONDS", 0.01)
    assert workers._attempt(Experiment(), tmp_path, print) == "is being written"
    tries.clear()
    assert workers._attempt(Experiment(), tmp_path, print, patience=10) == ""
    assert len(tries) == 3


class Given:
    """A future that ended so."""

    def __init__(self, outcome: str | Exception) -> None:
        self.outcome, self.status = outcome, "error" if isinstance(outcome, Exception) else "finished"

    def exception(self) -> Exception | None:
        return self.outcome if isinstance(self.outcome, Exception) else None

    def result(self) -> str:
        return self.outcome


class Futures(list):
    """As ``distributed.as_completed``."""

    add = list.append


def outcomes(monkeypatch: pytest.MonkeyPatch, path: Path, killed: int, *, begins: bool) -> tuple[list[str], int]:
    """What is said of a run whose worker dies so often before one ends it, and how often it was submitted."""
    ends = iter([workers.KilledWorker("task", SimpleNamespace(address="tcp://worker"), 3)] * killed + [""])
    heard, submitted = [], []

    def submit(*task: object, **how: object) -> Given:
        submitted.append(task)
        if begins:
            heard[0]((0, {"run": experiment.name, "steps": None}))
        return Given(next(ends))

    experiment, client = (
        Experiment(),
        SimpleNamespace(submit=submit, subscribe_topic=lambda _, hear: heard.append(hear)),
    )
    monkeypatch.setattr(workers, "as_completed", Futures)
    said = [error for _, error in workers.on_dask(client, {experiment: path}, lambda *done: None)]
    return said, len(submitted)


def test_a_run_is_not_given_up_for_workers_on_which_it_only_waited(tmp_path: Path, monkeypatch) -> None:
    assert outcomes(monkeypatch, tmp_path, 4, begins=False) == ([""], 5)
    (said,), submitted = outcomes(monkeypatch, tmp_path, 4, begins=True)
    assert "KilledWorker" in said
    assert submitted == 1
    (said,), submitted = outcomes(monkeypatch, tmp_path, 1000, begins=False)  # it kills them before it can say so
    assert "KilledWorker" in said
    assert submitted == workers._DEATHS


@pytest.mark.parametrize("status", ["running", "closing", "closing_gracefully", "closed"])
def test_a_worker_that_is_being_ended_lets_its_run_go(tmp_path: Path, monkeypatch, status: str) -> None:
    worker = SimpleNamespace(
        status=workers.Status[status], name=0, log_event=lambda *said: None, get_current_task=lambda: "task",
        state=SimpleNamespace(tasks={"task": SimpleNamespace(state="executing")}),
    )  # fmt: skip
    monkeypatch.setattr(workers, "get_worker", lambda: worker)
    monkeypatch.setattr(workers, "_attempt", lambda run, path, report, **how: report(1) or "went on")
    if status == "running":
        assert workers._on_worker(Experiment(), tmp_path, "topic") == "went on"
        return
    with pytest.raises(CancelledError):
        workers._on_worker(Experiment(), tmp_path, "topic")
