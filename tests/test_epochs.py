"""An epoch is a pass over the data in which the network trains; evaluations and looks are none, and leave no trace."""

import gc
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, open_run
from dynamics.recording.epochs import Pass

Step = Callable[[list[torch.Tensor]], None]


def evaluate(model: nn.Module, batches: Iterable) -> None:
    model.eval()
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    model.train()


def inside(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    watched = recorder.watch(loader)
    for _ in range(3):
        for number, batch in enumerate(watched):
            if number % 2 == 0:
                evaluate(model, watched)
            step(batch)
            evaluate(model, watched)
        recorder.log_epoch(test_accuracy=0.5)


def a_few_batches_inside(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    watched = recorder.watch(loader)
    for _ in range(3):
        for batch in watched:
            evaluate(model, [next(iter(watched))])
            step(batch)
        recorder.log_epoch(test_accuracy=0.5)


def after_each(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    watched, others = recorder.watch(loader), recorder.watch(loader)
    next(iter(watched))
    evaluate(model, others)
    for _ in range(3):
        for batch in watched:
            step(batch)
        evaluate(model, watched)
        evaluate(model, others)
        recorder.log_epoch(test_accuracy=0.5)


def read_before_it_is_used(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    for _ in range(3):
        for batch in list(recorder.watch(loader)):
            step(batch)
        recorder.log_epoch(test_accuracy=0.5)


def side_by_side(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    one, other = recorder.watch(loader), recorder.watch(loader)
    for _ in range(3):
        for batch, _ in zip(one, other, strict=True):
            step(batch)
        recorder.log_epoch(test_accuracy=0.5)


def between_steps_of_one_batch(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
    watched = recorder.watch(loader)
    for batch in watched:
        for _ in range(3):
            step(batch)
            evaluate(model, watched)


def record(path: Path, loop: Callable, **settings: object) -> tuple[xr.DataTree, list[float]]:
    """The record, and the loss of each step as it was, with dropout and BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = DataLoader(TensorDataset(torch.randn(24, 4).double(), torch.arange(24) % 3), 8, shuffle=True)
    losses = []

    def step(batch: list[torch.Tensor]) -> None:
        x, y = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with Recorder(path, model, optimizer, **settings) as recorder:
        loop(recorder, model, loader, step)
    return open_run(path), losses


@pytest.mark.parametrize("loop", [inside, a_few_batches_inside, after_each, read_before_it_is_used, side_by_side])
def test_the_passes_that_train_are_counted(tmp_path: Path, loop: Callable) -> None:
    run, _ = record(tmp_path / "run.zarr", loop, curvature_every=0)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert run["epochs"].epoch.values.tolist() == [0, 1, 2]


LOOPS = [inside, a_few_batches_inside, after_each, read_before_it_is_used, between_steps_of_one_batch]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_is_of_the_batch_that_it_was_of_though_others_were_evaluated(tmp_path: Path, loop: Callable) -> None:
    run, losses = record(tmp_path / "run.zarr", loop, curvature_every=1)
    assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses, rel=1e-12)


def test_what_the_loop_observes_itself_is_not_of_a_pass_that_it_only_evaluated(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        for batch in loader:
            evaluate(model, recorder.watch(loader))
            recorder.observe(batch)
            step(batch)

    run, losses = record(tmp_path / "run.zarr", loop, curvature_every=1)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0]
    assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses, rel=1e-12)


def test_what_is_set_on_a_watched_loader_is_set_on_the_loader(tmp_path: Path) -> None:
    class Loader:
        mixed = True

        def __iter__(self) -> Iterable:
            yield "mixed" if self.mixed else "plain"

        def __getitem__(self, index: int) -> str:
            return f"batch {index}"

    model, loader = nn.Linear(2, 2), Loader()
    recorder = Recorder(tmp_path / "run.zarr", model, torch.optim.SGD(model.parameters(), 0.1))
    watched = recorder.watch(loader)
    watched.mixed = False
    assert list(watched) == ["plain"]
    assert watched[3] == "batch 3"
    del watched.mixed
    assert loader.mixed
    with pytest.raises(AttributeError):
        del watched.mixed
    recorder.close()


@pytest.mark.parametrize("told", ["observe", "nothing"])
def test_without_watched_data_what_is_logged_of_epochs_parts_them(tmp_path: Path, told: str) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        for _ in range(3):
            for batch in loader:
                if told == "observe":
                    recorder.observe(batch)
                step(batch)
            evaluate(model, loader)
            recorder.log_epoch(test_accuracy=0.5)

    run, _ = record(tmp_path / "run.zarr", loop, curvature_every=0)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert run["epochs"].epoch.values.tolist() == [0, 1, 2]


def test_epochs_that_the_loop_counts_are_its_own(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        evaluate(model, recorder.watch(loader))
        for _ in range(3):
            recorder.begin_epoch()
            for number, batch in enumerate(loader):
                recorder.observe(batch)
                step(batch)
                if number == 1:
                    evaluate(model, recorder.watch(loader))
            recorder.log_epoch(test_accuracy=0.5)

    run, losses = record(tmp_path / "run.zarr", loop, curvature_every=1)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses, rel=1e-12)


def test_an_epoch_that_the_loop_counts_counts_if_no_step_is_taken_in_it(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        for trains in (False, True, False, True):
            recorder.begin_epoch()
            if trains:
                step(next(iter(loader)))

    run, _ = record(tmp_path / "run.zarr", loop, curvature_every=0)
    assert run["steps"].epoch.values.tolist() == [1, 3]


def test_a_held_look_at_other_data_is_no_epoch(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        others = recorder.watch(loader)
        for _ in range(3):
            for batch in recorder.watch(loader):
                step(batch)
                held = iter(others)
                evaluate(model, [next(held)])

    run, losses = record(tmp_path / "run.zarr", loop, curvature_every=1)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize(
    ("reads", "every"),
    [
        ("before the forward pass, without gradients", 0),
        ("before the forward pass, without gradients", 2),
        ("before the backward pass", 1),
        ("before the step", 0),
        ("before the step", 2),
    ],
)
def test_nor_is_one_within_a_step(tmp_path: Path, reads: str, every: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    batches = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(3)]
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=every) as recorder:
        held = iter(recorder.watch(batches * 3))
        for _ in range(3):
            for x, y in recorder.watch(batches):
                if reads.startswith("before the forward pass"):
                    evaluate(model, itertools.islice(held, 1))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if reads == "before the backward pass":
                    evaluate(model, [next(held)])
                loss.backward()
                if reads == "before the step":
                    evaluate(model, [next(held)])
                optimizer.step()
                losses.append(loss.item())
    run = open_run(tmp_path / "run.zarr")
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    if every:
        assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses[::every], rel=1e-12)


def test_batches_of_a_pass_inside_another_are_trained_on(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        held = iter(recorder.watch(loader))
        next(held)
        for _ in range(3):
            step(next(iter(recorder.watch(loader))))

    run, losses = record(tmp_path / "run.zarr", loop, curvature_every=1)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0]
    assert run["curvature"].loss_before.values.tolist() == pytest.approx(losses, rel=1e-12)


def test_batches_drawn_one_by_one_after_epochs_begin_no_others(tmp_path: Path) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        watched = recorder.watch(loader)
        for _ in range(2):
            for batch in watched:
                step(batch)
            recorder.log_epoch(test_accuracy=0.5)
        for _ in range(2):
            step(next(iter(watched)))
            recorder.log_epoch(test_accuracy=0.5)

    run, _ = record(tmp_path / "run.zarr", loop, curvature_every=0)
    assert run["steps"].epoch.values.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("when", ["after the step", "after the evaluation", "after the epoch's"])
def test_a_watched_evaluation_takes_nothing_from_what_is_logged(tmp_path: Path, when: str) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        watched, number = recorder.watch(loader), 0
        for _ in range(2):
            for batch in watched:
                step(batch)
                if when == "after the step":
                    recorder.log(number=number)
                if when != "after the epoch's":
                    evaluate(model, watched)
                if when == "after the evaluation":
                    recorder.log(number=number)
                number += 1
            evaluate(model, watched)
            if when == "after the epoch's":
                recorder.log(number=number - 1)

    run, _ = record(tmp_path / "run.zarr", loop, curvature_every=1)
    numbers = run["steps"].number.values
    assert numbers[[2, 5]].tolist() == [2, 5]
    assert when == "after the epoch's" or numbers.tolist() == [0, 1, 2, 3, 4, 5]


def test_passes_that_are_over_are_let_go(tmp_path: Path) -> None:
    def passes() -> int:
        gc.collect()
        return sum(type(one) is Pass for one in gc.get_objects())

    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step) -> None:
        before = passes()
        for _ in range(20):
            for batch in recorder.watch(loader):
                step(batch)
            step(next(iter(recorder.watch(loader))))
        assert passes() - before < 4

    record(tmp_path / "run.zarr", loop, curvature_every=1)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("before", [1, np.nan, np.nan]),  # the mean of 0, 1 and 2
        ("between", [np.nan, np.nan, 1, np.nan, np.nan, np.nan]),
        ("inside", [1, 1, 1]),
    ],
)
def test_what_a_watched_evaluation_logs_is_of_the_step_that_it_would_be_of_unwatched(
    tmp_path: Path, when: str, expected: list[float]
) -> None:
    def loop(recorder: Recorder, model: nn.Module, loader: DataLoader, step: Step, *, watched: bool) -> None:
        def evaluation() -> None:
            with torch.no_grad():
                for number, (x, _) in enumerate(recorder.watch(loader) if watched else loader):
                    model(x)
                    recorder.log(evaluated=number)

        for batch in recorder.watch(loader) if when == "between" else ():
            step(batch)
        if when != "inside":
            evaluation()
        for batch in recorder.watch(loader):
            if when == "inside":
                evaluation()
            step(batch)

    for watched in (True, False):
        run, _ = record(tmp_path / f"{watched}.zarr", partial(loop, watched=watched), curvature_every=0)
        np.testing.assert_array_equal(run["steps"].evaluated.values, expected)
