"""Losses stay with their steps whatever part of a network is trained; a batch that was skipped is part of no step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynamics import Recorder, open_run
from dynamics.loop.backward_passes import BackwardPasses


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.trunk(x)))


def heads_in_turn(model: TwoHeads, number: int) -> int:
    return number % 2


def head_frozen_midway(model: TwoHeads, number: int) -> int:
    model.heads.requires_grad_(number < 3)
    return 0


def trunk_frozen_at_first(model: TwoHeads, number: int) -> int:
    model.trunk.requires_grad_(number > 2)
    return 0


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("head_of", [heads_in_turn, head_frozen_midway, trunk_frozen_at_first])
def test_losses_stay_with_their_steps(tmp_path: Path, head_of: Callable, watched: bool, micro_batches: int) -> None:
    torch.manual_seed(0)
    model = TwoHeads()

    def output_of(number: int, x: Tensor) -> Tensor:
        return model(x, head_of(model, number))

    assert_losses_stay(tmp_path / "run", model, output_of, micro_batches, watched=watched, early=False)


def assert_losses_stay(
    path: Path, model: nn.Module, output_of: Callable, micro_batches: int, *, watched: bool, early: bool
) -> None:
    """Train, log before the backward pass or after it, and compare each step's loss."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(path, model, optimizer, curvature_every=0) as recorder:
        for number, (x, y) in enumerate(recorder.watch(vectors(8)) if watched else vectors(8)):
            loss = F.cross_entropy(output_of(number, x), y)
            if early:
                recorder.log(loss=loss)
            (loss / micro_batches).backward()
            if not early:
                recorder.log(loss=loss)
            losses.append(loss.item())
            if number % micro_batches == micro_batches - 1:
                optimizer.step()
                optimizer.zero_grad()
    expected = np.reshape(losses, (-1, micro_batches)).mean(1)
    np.testing.assert_allclose(open_run(path)["steps"].loss, expected, rtol=1e-12)


def by_hand(model: nn.Module, loss: Tensor) -> None:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad


def with_graph(model: nn.Module, loss: Tensor) -> None:
    loss.backward(create_graph=True)


@pytest.mark.parametrize("backward", [by_hand, with_graph])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_skipped_batch_is_no_part_of_a_step_whatever_makes_gradients(tmp_path: Path, backward: Callable) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (x, y) in enumerate(recorder.watch(vectors(6))):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            backward(model, loss)
            if number in (1, 4):
                continue
            optimizer.step()
            losses.append(loss.item())
        optimizer.zero_grad()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_passes_within_a_pass_are_one(tmp_path: Path, micro_batches: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))

    def output_of(number: int, x: Tensor) -> Tensor:
        return model[3](checkpoint(model[1:3], model[0](x), use_reentrant=True))  # runs backward passes of its own

    assert_losses_stay(tmp_path / "run", model, output_of, micro_batches, watched=False, early=True)


def test_passes_are_counted_at_few_parameters_once_it_is_known_where_they_arrive() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    passes, hooks = BackwardPasses(lambda: list(model.parameters())), []
    model[0].requires_grad_(False)
    for step in range(5):
        if step == 3:
            model[0].requires_grad_(True)
            model[1:].requires_grad_(False)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
        assert (passes.count, passes.pending) == (2, True) or step == 3  # when gradients come to other parameters
        passes.stepped()
        model.zero_grad()
        hooks.append(sum(len(one._post_accumulate_grad_hooks or ()) for one in model.parameters()))
    assert hooks[:3] == [2, 2, 2]
    assert hooks[4] <= 4
    passes.close()
    assert not any(one._post_accumulate_grad_hooks for one in model.parameters())
