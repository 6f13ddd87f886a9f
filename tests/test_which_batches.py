"""Which batches a step is of: those whose gradients are in it, however the loop reads and leaves them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import Batch, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run


def halves(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    return [F.cross_entropy(model(part[0]), part[1]) / 2 for part in zip(*(t.chunk(2) for t in batch), strict=True)]


def test_two_backward_passes_a_batch_and_batches_that_are_left_out(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(6))):
            if number in (0, 3):
                continue
            optimizer.zero_grad()
            parts = halves(model, batch)
            for part in parts:
                part.backward()
            optimizer.step()
            losses.append(sum(parts).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("log", ["before the backward pass", "after the step"])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_batches_that_are_read_ahead(tmp_path: Path, ahead: int, every: int, log: str) -> None:
    def prefetched(batches: Iterable[Batch]) -> Iterator[Batch]:
        """As a loader that copies to a GPU while the network computes."""
        waiting: list[Batch] = []
        for batch in batches:
            waiting.append(batch)
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting

    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
        for _ in range(2):
            for batch in prefetched(recorder.watch(vectors(5))):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0]), batch[1])
                if log == "before the backward pass":
                    recorder.log(loss=loss)
                loss.backward()
                by_hand.before()
                optimizer.step()
                by_hand.after()
                if log == "after the step":
                    recorder.log(loss=loss)
                losses.append(loss.item())
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::every], rtol=1e-12)


def test_a_model_that_changes_its_precision(tmp_path: Path) -> None:
    model = smooth_network().float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = []

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0].to(model[0].weight.dtype)), batch[1])

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                model.double()
            by_hand = ByHand(model)
            optimizer.zero_grad()
            objective(model, batch).backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            rows += by_hand.rows
    steps = open_run(tmp_path / "run")["steps"]
    for name in ("grad_sqnorm", "param_grad", "update_sqnorm", "grad_update"):
        expected = np.array([[row[layer][name] for layer in ("0", "2")] for row in rows])
        np.testing.assert_allclose(steps[name][2:], expected[2:], rtol=1e-12, err_msg=name)
    assert steps.distance_sqnorm.notnull().all()


def test_a_forward_pass_for_another_sake_comes_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, scale = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Linear(9, 3)), nn.Parameter(torch.ones(()))
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([scale], 0.1)
    losses = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch, held_out in zip(recorder.watch(vectors(6)), vectors(6, seed=2), strict=True):
            other.zero_grad()  # as architectures are searched for
            (scale * F.cross_entropy(model(held_out[0]), held_out[1])).backward()
            other.step()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_micro_batches_of_different_sizes_count_as_the_loop_counts_them(tmp_path: Path, weighted: bool) -> None:
    torch.manual_seed(0)
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(x[:size], y[:size]) for (x, y), size in zip(vectors(6), (16, 3) * 3, strict=True)]
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (x, y) in enumerate(recorder.watch(batches)):
            loss = F.cross_entropy(model(x), y) * (len(x) / 19 if weighted else 0.5)
            loss.backward()
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, np.reshape(losses, (-1, 2)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)
