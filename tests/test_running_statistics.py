"""An event that was given no mode says where running statistics lag far behind the weights."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import Batch, convolutional_network, images, plain_step
from torch import nn

from dynamics import Recorder, open_run
from dynamics.recording.running_statistics import RunningStatistics

BATCHES = images(2)


def trained(*, momentum: float | None, dropout: float = 0.0, steps: int = 60) -> nn.Sequential:
    """Its running statistics lag if they hardly move; with no momentum they are the mean of those of all steps."""
    model = convolutional_network(dropout)
    model[1].momentum = momentum
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for number in range(steps):
        plain_step(model, optimizer, BATCHES[number % 2])
    if momentum is None:
        model[1].reset_running_stats()
        for x, _ in BATCHES:
            model(x)
    return model


def by_hand(model: nn.Module, mode: str, batches: list[Batch] = BATCHES) -> float:
    other = copy.deepcopy(model).train(mode == "train")
    return float(np.mean([F.cross_entropy(other(x), y).item() for x, y in batches]))


def looked_at(path: Path, model: nn.Module, batches: list[Batch] = BATCHES, **mode: str) -> xr.Dataset:
    """Two events that change nothing."""
    with Recorder(path, model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        for _ in range(2):
            with recorder.event("look", probe=batches, **mode):
                pass
    return open_run(path)["pruning"].to_dataset()


@pytest.mark.parametrize("in_mode", ["train", "eval"])
def test_statistics_that_lag_are_said_once_and_leave_no_trace(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, in_mode: str
) -> None:
    model = trained(momentum=0.001, dropout=0.1).train(in_mode == "train")
    state, drawn = copy.deepcopy(model.state_dict()), (torch.get_rng_state(), random.getstate())
    found = looked_at(tmp_path / "default", model)
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    assert all(module.training == (in_mode == "train") for module in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    (said,) = [str(one.message) for one in recwarn]
    evaluated = by_hand(model, "eval")
    assert said.startswith(f"the probe's loss is {evaluated:.4g} in eval mode, in which event() measures by default, ")
    assert 'event(..., mode="train")' in said
    xr.testing.assert_identical(found, looked_at(tmp_path / "given", model, mode="eval"))
    assert len(recwarn) == 1


def test_the_numbers_are_those_of_both_modes(tmp_path: Path) -> None:
    model = trained(momentum=0.001)
    modes = by_hand(model, "eval"), by_hand(model, "train")
    assert modes[0] > 3 * modes[1]
    with pytest.warns(UserWarning, match=rf"loss is {modes[0]:.4g} in eval mode.* and {modes[1]:.4g} in training mode"):
        looked_at(tmp_path / "run", model)


@pytest.mark.parametrize(
    "case", ["eval", "train", "frozen", "none", "up to date", "dropout", "untrained", "one sample"]
)
def test_nothing_is_said_where_training_sees_the_same_or_a_mode_was_given(tmp_path: Path, case: str) -> None:
    mode = {"mode": case} if case in ("eval", "train") else {}
    momentum, dropout = None if case in ("up to date", "dropout") else 0.001, 0.8 * (case == "dropout")
    model, batches = trained(momentum=momentum, dropout=dropout, steps=60 * (case != "untrained")), BATCHES
    if case == "frozen":
        model[1].eval()
    if case == "none":
        model[1].running_mean = model[1].running_var = None
    if case == "one sample":
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        batches = [(torch.randn(1, 4), torch.tensor([1]))]
    found = looked_at(tmp_path / "run", model, batches, **mode)
    assert (found["mode"] == mode.get("mode", "eval")).all()


@pytest.mark.parametrize(
    ("evaluated", "training", "said"),
    [
        (2.3, 0.2, True), (0.12, 0.03, True), (2.3, 1.2, False), (0.2, 2.3, False), (-1.0, -1.6, True),
        (-1.0, -1.4, False), (2.3, float("nan"), False),
    ],
)  # fmt: skip
def test_far_apart_is_more_than_half_of_the_loss(
    recwarn: pytest.WarningsRecorder, evaluated: float, training: float, said: bool
) -> None:
    RunningStatistics(nn.BatchNorm1d(3)).compare(*map(torch.tensor, (evaluated, training)))
    assert len(recwarn) == said
