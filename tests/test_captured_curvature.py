"""Curvature measured in fixed places of memory is that of the step, here without a GPU: what is captured runs again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from networks import convolutional_network, images, plain_step
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.captured_curvature import CapturedCurvature
from dynamics.masks import apply_masks


class Again:
    """In place of a CUDA graph: computes from the same tensors again, into the same tensors."""

    made = 0

    def __init__(self, work: Callable[[], Any]) -> None:
        Again.made += 1
        self._work, self._result = work, None

    def __call__(self) -> Any:
        found = self._work()
        if self._result is None:
            self._result = found
        for into, tensor in zip(tensors(self._result), tensors(found), strict=True):
            into.copy_(tensor)
        return self._result


def tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    parts = found.values() if isinstance(found, dict) else found
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Again.made = 0
    monkeypatch.setattr(CapturedCurvature, "_captured", lambda self, work: Again(work))
    monkeypatch.setattr(CapturedCurvature, "_on_gpu", lambda self, probe: True)


def record(
    path: Path, model: nn.Module, change: Callable[[int, nn.Module], None], *, capture: bool, device: str = "cpu"
) -> xr.DataTree:
    """A training with batches of two sizes, in which something changes between the steps."""
    torch.manual_seed(4)
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = [*images(5), *images(1, seed=2, size=5), *images(6, seed=3)]
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in batches]
    with Recorder(path, model, optimizer, curvature_every=1, capture=capture) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            change(number, model)
            plain_step(model, optimizer, batch)
    return open_run(path)


def prune(number: int, model: nn.Module) -> None:
    if number in (2, 8):
        places = torch.arange(model[0].weight.numel()).reshape(model[0].weight.shape)
        apply_masks(model, {"0.weight": places % 8 != number // 2})


def freeze(number: int, model: nn.Module) -> None:
    model[0].weight.requires_grad_(number < 3)


def swap(number: int, model: nn.Module) -> None:
    if number in (3, 9):
        model[5].weight.data = model[5].weight.data.clone()


def switch(number: int, model: nn.Module) -> None:
    model[1].train(number not in (3, 4))


def keep(number: int, model: nn.Module) -> None:
    pass


CHANGES = (keep, prune, freeze, swap, switch)


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_that_of_the_step(tmp_path: Path, change: Callable[[int, nn.Module], None]) -> None:
    model = convolutional_network()
    other = convolutional_network()
    other.load_state_dict(model.state_dict())
    found = record(tmp_path / "captured", model, change, capture=True)
    assert Again.made >= 4  # before the smaller batch and after it, two each
    expected = record(tmp_path / "plain", other, change, capture=False)
    for node in ("steps", "curvature"):
        xr.testing.assert_identical(found[node].to_dataset(), expected[node].to_dataset())


@pytest.mark.usefixtures("without_a_gpu")
def test_what_draws_random_numbers_is_not_captured(tmp_path: Path) -> None:
    record(tmp_path / "run", convolutional_network(dropout=0.5), keep, capture=True)
    assert not Again.made
