"""Several steps on one batch: each is a step of that batch, with a row and a curvature of its own."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import Batch, convolutional_network, images, plain_step, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run


@pytest.mark.parametrize("curvature_every", [1, 4])
@pytest.mark.parametrize("when", ["before the backward pass", "before the step", "after the step"])
def test_each_step_is_one_of_the_watched_batch(tmp_path: Path, when: str, curvature_every: int) -> None:
    model, losses, after = convolutional_network(dropout=0.3), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=curvature_every) as recorder:
        for inputs, labels in recorder.watch(images(2)):
            for _ in range(3):
                optimizer.zero_grad()
                state = torch.get_rng_state()
                loss = F.cross_entropy(model(inputs), labels)
                losses.append(loss.item())
                if when == "before the backward pass":
                    recorder.log(loss=loss)
                loss.backward()
                if when == "before the step":
                    recorder.log(loss=loss)
                by_hand.before()
                optimizer.step()
                by_hand.after()
                if when == "after the step":
                    recorder.log(loss=loss)
                with torch.random.fork_rng(), torch.no_grad():
                    torch.set_rng_state(state)
                    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
                    after.append(F.cross_entropy(torch.func.functional_call(model, buffers, (inputs,)), labels).item())
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    assert run["curvature"].step.values.tolist() == list(range(0, 6, curvature_every))
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::curvature_every], rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_after, after[::curvature_every], rtol=1e-12)
    grads = run["steps"].grad_sqnorm.sel(step=run["curvature"].step)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, grads, rtol=1e-9)


@pytest.mark.parametrize("curvature_every", [1, 2])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.filterwarnings("ignore:/curvature may be of another loss")
def test_each_step_of_a_batch_has_its_own_noise_before_the_network_runs(
    tmp_path: Path, clipped: bool, curvature_every: int
) -> None:
    def noisy_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])

    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    how = {"objective": noisy_loss, "curvature_every": curvature_every}
    with Recorder(tmp_path / "run", model, optimizer, **how) as recorder:
        for batch in recorder.watch(vectors(3)):
            for _ in range(3):
                optimizer.zero_grad()
                loss = noisy_loss(model, batch)
                loss.backward()
                if clipped:  # so that no gradient surely is the one applied
                    nn.utils.clip_grad_value_(model.parameters(), 0.01)
                optimizer.step()
                losses.append(loss.item())
    loss_before = open_run(tmp_path / "run")["curvature"].loss_before
    np.testing.assert_allclose(loss_before, losses[::curvature_every], rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_teacher_within_that_follows_between_the_steps_of_a_batch(tmp_path: Path) -> None:
    """It is larger than what is trained, and would be kept only if it moved within a step."""

    class Taught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pupil, self.teacher = smooth_network(), nn.Linear(4, 60).requires_grad_(False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.pupil(inputs) + self.teacher(inputs)[:, :3]

    model, losses = Taught(), []
    optimizer = torch.optim.SGD(model.pupil.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(2)):
            for _ in range(3):
                losses.append(plain_step(model, optimizer, batch).item())
                model.teacher.weight.data.mul_(0.9)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_steps_with_closures_and_a_forward_pass_in_between(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):

            def closure(inputs: torch.Tensor = inputs, labels: torch.Tensor = labels) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            for _ in range(2):
                loss = optimizer.step(closure)
                losses.append(loss.item())
                recorder.log(loss=loss)
            model(inputs + 1)  # nobody takes its gradient
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)


def test_gradients_that_pile_up_over_the_steps_of_a_batch_and_the_next(tmp_path: Path) -> None:
    model, batches, expected = smooth_network(), vectors(2), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss_of(number: int) -> torch.Tensor:
        return F.cross_entropy(model(batches[number][0]), batches[number][1]) / 2

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        watched = iter(recorder.watch(batches))
        next(watched)
        loss_of(0).backward()
        optimizer.step()
        optimizer.zero_grad()
        (first := loss_of(0)).backward()
        next(watched)
        (second := loss_of(1)).backward()
        expected.append((first + second).item())
        optimizer.step()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before[1:], expected, rtol=1e-12)


def test_an_observed_batch_is_that_of_one_step(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unknown = pytest.warns(UserWarning, match="curvature is not recorded at step 1, whose batch is not known")
    with unknown, Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number in range(4):
            if number in (0, 2):
                recorder.observe(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].step.values.tolist() == [0, 2]


def one_of(watched: object) -> Batch:
    """The first batch of a loader, as when a network is to learn it by heart."""
    for batch in watched:
        return batch


@pytest.mark.parametrize("first", [one_of, lambda watched: next(iter(watched))])
def test_one_batch_is_learned_by_heart(tmp_path: Path, first: Callable) -> None:
    model = convolutional_network(dropout=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        batch = first(recorder.watch(images(3)))
        for _ in range(4):
            plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    assert run["curvature"].step.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


def test_other_batches_after_a_pass_was_left_have_no_curvature(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unknown = pytest.warns(UserWarning, match="curvature is not recorded at step 1, whose batch is not known")
    with unknown, Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            plain_step(model, optimizer, batch)
            break
        for batch in vectors(3, seed=7):
            plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    assert run["curvature"].step.values.tolist() == [0]
    assert run["steps"].sizes["step"] == 4


@pytest.mark.parametrize("outside", [True, False])
def test_batches_that_come_again_are_watched_as_a_whole(tmp_path: Path, outside: bool) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unknown = pytest.warns(UserWarning, match=r"at step 2, whose batch is not known.*itertools.cycle\(loader\)")
    with nullcontext() if outside else unknown:
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
            watched = recorder.watch(cycle(vectors(2))) if outside else cycle(recorder.watch(vectors(2)))
            for batch in islice(watched, 5):
                plain_step(model, optimizer, batch)
    assert open_run(tmp_path / "run")["curvature"].sizes["step"] == (5 if outside else 2)
