"""A loop that goes on in its record: what shows when it begins is seen again, what is not known is not guessed."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import plain_step, prefetched, smooth_network, vectors

from dynamics import Recorder, open_run
from dynamics.record.store import Store
from dynamics.recording.resume_points import ResumePoint, ResumePoints


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_loop_that_reads_ahead_goes_on_at_any_step(tmp_path: Path, stop: int) -> None:
    model, batches, losses = smooth_network(), vectors(10), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part in (batches[:stop], batches[stop:]):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=4, resume=True) as recorder:
            for inputs, labels in prefetched(recorder.watch(part)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    curvature = open_run(tmp_path / "run")["curvature"]
    assert curvature.step.values.tolist() == [0, 4, 8]
    np.testing.assert_allclose(curvature.loss_before, losses[::4], rtol=1e-12)


class Scheduled:
    """A training whose learning rate falls at each step, and its flow time by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = smooth_network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.times = [0.0]

    def train(self, recorder: Recorder, steps: int) -> None:
        for batch in recorder.watch(vectors(steps)):
            self.times.append(self.times[-1] + self.optimizer.param_groups[0]["lr"])
            plain_step(self.model, self.optimizer, batch)
            self.scheduler.step()


@pytest.mark.parametrize("stop", [4, 5, 6, 7])
def test_flow_time_goes_on_where_the_rate_changed_between_recorded_steps(tmp_path: Path, stop: int) -> None:
    training = Scheduled()
    for begin, steps in ((0, stop), (stop, 12 - stop)):
        how = {"every": 4, "curvature_every": 0, "resume": True, "step": begin}
        with Recorder(tmp_path / "run.zarr", training.model, training.optimizer, **how) as recorder:
            training.train(recorder, steps)
    assert open_run(tmp_path / "run.zarr").steps.step.values.tolist() == [0, 4, 8]
    np.testing.assert_allclose(open_run(tmp_path / "run.zarr").steps.flow_time, training.times[:12:4], rtol=1e-12)


@pytest.mark.parametrize("flushed", [True, False])
def test_flow_time_is_known_at_a_checkpoint_before_which_the_record_was_flushed(tmp_path: Path, flushed: bool) -> None:
    training, how = Scheduled(), {"every": 4, "curvature_every": 0}
    with Recorder(tmp_path / "run.zarr", training.model, training.optimizer, **how) as recorder:
        training.train(recorder, 6)
        if flushed:
            recorder.flush()
        saved = copy.deepcopy(training)
        training.train(recorder, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed = Recorder(tmp_path / "run.zarr", saved.model, saved.optimizer, **how, resume="rewind", step=6)
    with resumed as recorder:
        saved.optimizer.param_groups[0]["lr"] *= 3  # it goes on otherwise than it did
        saved.train(recorder, 4)
    assert ["flow_time is not known from step 6 on" in str(one.message) for one in said] == [True] * (not flushed)
    expected = [*saved.times[:8:4], saved.times[8] if flushed else np.nan]
    np.testing.assert_allclose(open_run(tmp_path / "run.zarr").steps.flow_time, expected, rtol=1e-12)


def test_flow_time_goes_on_where_the_record_has_no_flow_steps(tmp_path: Path) -> None:
    training, how = Scheduled(), {"curvature_every": 0, "quantities": ["flow_time"], "resume": True}
    for begin in (0, 5):
        with Recorder(tmp_path / "run.zarr", training.model, training.optimizer, **how, step=begin) as recorder:
            training.train(recorder, 5)
    np.testing.assert_allclose(open_run(tmp_path / "run.zarr").steps.flow_time, training.times[:10], rtol=1e-12)


def test_what_was_taken_back_is_forgotten(tmp_path: Path) -> None:
    known = ResumePoints(Store(tmp_path / "run.zarr", {}))
    known.keep(3, ResumePoint(0.3))
    known.keep(5, ResumePoint(0.5))
    known.keep(5, ResumePoint(0.6, within=True))
    assert [known.at(step) for step in (3, 4, 5)] == [(0.3, False), None, (0.6, True)]
    known.forget_from(3)
    assert [known.at(step) for step in (3, 5)] == [(0.3, False), None]
    known.forget_from(2)
    assert known.at(3) is None


class StopError(Exception):
    pass


@pytest.mark.parametrize("stops", ["by an exception", "after a flush", "after a flush and a save"])
@pytest.mark.parametrize(
    ("reads", "at"), [(list, 3), (iter, 3), (prefetched, 3), (prefetched, 6), (list, 7), (iter, 7)]
)
def test_a_loop_that_stopped_amid_an_epoch_goes_on_with_it(
    tmp_path: Path, reads: Callable[[Iterable], Iterable], at: int, stops: str
) -> None:
    """Where the loop does not know itself that a pass is over (7 of 7 batches), its loader may."""
    model, batches = smooth_network(), vectors(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(recorder: Recorder, part: list, stop: int) -> None:
        watched = recorder.watch(iter(part) if reads is iter else part)
        for number, batch in enumerate(prefetched(watched) if reads is prefetched else watched, 1):
            plain_step(model, optimizer, batch)
            if number == stop and stops == "by an exception":
                raise StopError
            if number == stop:
                recorder.flush()
                if stops == "after a flush":
                    break
                raise StopError

    with suppress(StopError), Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        train(recorder, batches, at)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1, resume=True) as recorder:
        for part in (batches[at:], batches) if at < 7 else (batches, batches):
            train(recorder, part, 0)
    epochs = open_run(tmp_path / "run")["steps"].epoch.values.tolist()
    known = at < 7 or reads is list  # an iterator has no length
    assert epochs == [0] * 7 + [1] * 7 + [2] * 7 * (at == 7) if known else epochs == [0] * 14 + [1] * 7


def test_a_pass_that_was_whole_when_the_record_was_closed_has_ended(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume=True) as recorder:
            for batch in recorder.watch(iter(vectors(2))):
                plain_step(model, optimizer, batch)
                recorder.flush()
    assert open_run(tmp_path / "run")["steps"].epoch.values.tolist() == [0, 0, 1, 1, 2, 2]


class Counting:
    """A loader that draws random numbers to know its length."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator:
        return iter(self.batches)

    def __len__(self) -> int:
        raise AssertionError("its length may cost a pass over the data")


def test_no_loader_is_asked_for_a_length_that_may_cost_something(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for batch in recorder.watch(Counting(vectors(3))):
            plain_step(model, optimizer, batch)
            recorder.flush()
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 3


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("after", [1, 2])
def test_an_epoch_that_ends_as_the_one_before_it_did_is_over(tmp_path: Path, limited: bool, after: int) -> None:
    """By a break, or because an iterator has no more: a checkpoint within the loop, at its last batch, is its end."""
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(epochs: int, saves: bool) -> None:
        with (
            suppress(StopError),
            Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume=True) as recorder,
        ):
            for epoch in range(epochs):
                for number, batch in enumerate(recorder.watch(vectors(6) if limited else iter(vectors(3))), 1):
                    plain_step(model, optimizer, batch)
                    if saves and epoch == epochs - 1 and number == 3:
                        recorder.flush()
                        raise StopError
                    if number == 3 and limited:
                        break

    train(after + 1, saves=True)
    train(2, saves=False)
    assert open_run(tmp_path / "run")["steps"].epoch.values.tolist() == np.repeat(range(after + 3), 3).tolist()


@pytest.mark.parametrize("logs", ["amid an epoch", "after a break"])
def test_an_epoch_is_over_where_it_is_logged_after_its_pass_was_abandoned(tmp_path: Path, logs: str) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    how = {"curvature_every": 0, "resume": True}
    with suppress(StopError), Recorder(tmp_path / "run", model, optimizer, **how) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(7)), 1):
            plain_step(model, optimizer, batch)
            if number == 3 and logs == "amid an epoch":
                recorder.log_epoch(test_loss=1.0)
                recorder.flush()
            if number == 3:
                break
        if logs == "after a break":
            recorder.log_epoch(test_loss=1.0)
        raise StopError
    with Recorder(tmp_path / "run", model, optimizer, **how) as recorder:
        for batch in recorder.watch(vectors(4)):
            plain_step(model, optimizer, batch)
    expected = [0] * 7 if logs == "amid an epoch" else [0] * 3 + [1] * 4
    assert open_run(tmp_path / "run")["steps"].epoch.values.tolist() == expected
