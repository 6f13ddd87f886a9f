"""Curvature measured in fixed places of memory is that of the step, here without a GPU: what is captured runs again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import Batch, convolutional_network, images, plain_step, recorded, smooth_network, step_along, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.measuring.captured_curvature import CapturedCurvature
from dynamics.network.masks import apply_masks
from dynamics.probing.objective import cross_entropy_objective


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
    monkeypatch.setattr(CapturedCurvature, "_on_gpu", lambda self: True)


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


@pytest.mark.usefixtures("without_a_gpu")
def test_a_network_that_shares_a_weight_with_the_model_is_not_captured(tmp_path: Path) -> None:
    model, teacher = smooth_network(), smooth_network()
    teacher[2].weight = model[2].weight

    def taught(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), teacher(batch[0]).detach().softmax(-1))

    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    with Recorder(tmp_path / "run", model, optimizer, objective=taught, curvature_every=1, capture=True) as recorder:
        for batch in recorder.watch(vectors(4)):
            losses.append(step_along(taught(model, batch), optimizer))
    np.testing.assert_allclose(open_run(tmp_path / "run").curvature.loss_before, losses, rtol=1e-12)
    assert not Again.made


@dataclass
class Pair:
    """A batch of a class of its own."""

    inputs: Tensor
    labels: Tensor


class Growing(nn.Module):
    """A buffer that gets another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.passes = nn.Linear(4, 3), 0
        self.register_buffer("scale", torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) * self.scale


class Fading(Growing):
    """Each forward pass has less of it."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        self.scale = self.scale * 0.5
        return outputs


def grow(number: int, model: nn.Module) -> None:
    if number == 3:
        model.scale = torch.tensor([2.0, 1.0, 0.5])


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor, float]) -> Tensor:
    return batch[2] * F.cross_entropy(model(batch[0]), batch[1])


def of_pair(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.labels)


class WithCentre:
    """An objective with a module of its own that moves."""

    def __init__(self, centre: nn.Module) -> None:
        self.centre = centre

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.centre(model(batch[0])), batch[1])


class Counting(nn.Module):
    """A number outside the buffers."""

    count = 1

    def forward(self, outputs: Tensor) -> Tensor:
        self.count += 1
        return outputs / self.count


class Recalling(nn.Module):
    """What it keeps of the last batch is another tensor each time."""

    last: Tensor | None = None

    def forward(self, outputs: Tensor) -> Tensor:
        outputs = outputs if self.last is None else outputs + self.last
        self.last = outputs.detach().mean(0) / 2
        return outputs


def behind(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(smooth_network(), kind())


def averaging() -> nn.Module:
    """Its BatchNorm asks for the number of batches so far."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None), nn.Tanh(), nn.Linear(5, 3))


class Waiting(Again):
    """As a capture, in which to wait for the GPU is an error."""

    def __call__(self) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


LOOPS = {
    "number": (smooth_network, lambda: [(*b, float(1 + n % 2)) for n, b in enumerate(vectors(6))], weighted, keep, 0),
    "class": (smooth_network, lambda: [Pair(*batch) for batch in vectors(6)], of_pair, keep, 0),
    "buffer of another": (smooth_network, lambda: vectors(6), lambda: nn.BatchNorm1d(3, affine=False), keep, 0),
    "number of another": (smooth_network, lambda: vectors(6), Counting, keep, 0),
    "number of its own": (behind(Counting), lambda: vectors(6), cross_entropy_objective, keep, 0),
    "tensor of its own": (behind(Recalling), lambda: vectors(6), cross_entropy_objective, keep, 0),
    "buffer": (Growing, lambda: vectors(6), cross_entropy_objective, grow, 4),
    "values of a buffer": (Fading, lambda: vectors(6), cross_entropy_objective, keep, 2),
}


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("name", LOOPS)
def test_what_may_change_between_steps(tmp_path: Path, name: str) -> None:
    make, batches, loss_of, change, captures = LOOPS[name]
    found, states = [], []
    for capture in (True, False):
        torch.manual_seed(1)
        model, objective = make(), WithCentre(loss_of()) if "another" in name else loss_of
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        path = tmp_path / f"{capture}"
        with Recorder(path, model, optimizer, objective=objective, curvature_every=1, capture=capture) as recorder:
            for number, batch in enumerate(recorder.watch(batches())):
                change(number, model)
                optimizer.zero_grad()
                objective(model, batch).backward()
                optimizer.step()
        found.append(open_run(path)["curvature"].to_dataset())
        states.append(
            [*model.state_dict().values(), *getattr(objective, "centre", nn.Identity()).state_dict().values()]
        )
    xr.testing.assert_identical(*found)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    assert Again.made == captures


@pytest.mark.usefixtures("without_a_gpu")
def test_where_a_capture_fails_it_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedCurvature, "_captured", lambda self, work: Waiting(work)())
    found = []
    for capture in (True, False):
        torch.manual_seed(1)
        model = averaging()
        optimizer, path = torch.optim.SGD(model.parameters(), 0.1), tmp_path / f"{capture}"
        with pytest.warns(match="cannot be captured") if capture else nullcontext():
            found.append(recorded(path, model, optimizer, vectors(6), curvature_every=1, capture=capture)["curvature"])
    xr.testing.assert_identical(*(one.to_dataset() for one in found))
    assert Again.made == 1
