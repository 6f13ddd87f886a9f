"""What a loss refers to besides the model, such as a memory bank: as it was, whichever of its methods is called."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import curvature_by_hand
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.probing.ownership import modules_of
from dynamics.probing.probe import Probe


class Bank(nn.Module):
    """Subtracts a running mean, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1 * self.times)
        return (x - self.mean).square().mean()


class Loss(nn.Module):
    """Runs its bank as the losses of the library ``lightly`` do: by the forward method, which calls no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.bank.forward(x)

    def measure(self, x: Tensor) -> Tensor:
        return self.bank.forward(x)


class Entered(nn.Module):
    """Enters something before its forward pass and leaves it afterwards, as Pyro's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.depth, self.noise = nn.Linear(4, 1), 0, torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        if self.depth == 0:
            self.noise = torch.randn(())
        self.depth += 1
        try:
            return super().__call__(x)
        finally:
            self.depth -= 1

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.noise).square().mean()


def far(module: nn.Module) -> Any:
    """Farther away than anyone looks."""
    for _ in range(8):
        module = SimpleNamespace(one=module)
    return module


def at(place: Any) -> nn.Module:
    for _ in range(8):
        place = place.one
    return place


def through(place: Any, get: Callable[[Any], Callable]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: get(place)(model(x))


WAYS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], Callable]]] = {
    "part": (Loss, lambda loss: through(loss, lambda place: place)),
    "method": (Loss, lambda loss: through(loss, lambda place: place.measure)),
    "in a list": (Loss, lambda loss: through([loss], lambda place: place[0].measure)),
    "in a dictionary": (Loss, lambda loss: through({"it": loss}, lambda place: place["it"].measure)),
    "in a library's object": (Loss, lambda loss: through(SimpleNamespace(it=loss), lambda place: place.it.measure)),
    "part far away": (Loss, lambda loss: through(far(loss), at)),
    "entered": (Entered, lambda loss: through(loss, lambda place: place)),
    "entered far away": (Entered, lambda loss: through(far(loss), at)),
}


def made(way: str) -> tuple[nn.Module, nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A model, what is beside it, and the objective."""
    kind, objective = WAYS[way]
    model, beside = nn.Linear(6, 4), kind()
    return model, beside, objective(beside)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_beside_it_stays_as_it_was_and_is_measured_as_it_was(tmp_path: Path, way: str) -> None:
    losses: dict[bool, list[float]] = {}
    ends: dict[bool, list[Tensor]] = {}
    for recorded in (False, True):
        torch.manual_seed(0)
        model, beside, objective = made(way)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(tmp_path / f"{recorded}", model, optimizer, objective=objective, curvature_every=recorded)
        losses[recorded], by_hand = [], []
        with recorder:
            for _ in range(4):
                x = torch.randn(8, 6)
                recorder.observe(x)
                loss = objective(model, x)
                by_hand.append(curvature_by_hand(loss, list(model.parameters())))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[recorded].append(loss.item())
        ends[recorded] = [*model.state_dict().values(), *beside.state_dict().values()]
        counts = getattr(beside, "depth", 4), beside.bank.times if hasattr(beside, "bank") else 0
        assert counts == ((0, 0) if isinstance(beside, Entered) else (4, 4))
    assert losses[True] == losses[False]
    assert all(map(torch.equal, ends[True], ends[False]))
    curvature = open_run(tmp_path / "True").curvature
    for quantity in by_hand[0]:
        found = curvature[quantity].sum("layer") if "layer" in curvature[quantity].dims else curvature[quantity]
        np.testing.assert_allclose(found, [one[quantity] for one in by_hand], 1e-9, err_msg=quantity)
    np.testing.assert_allclose(curvature.loss_before, losses[True], 1e-12)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "entered far away"])
def test_an_event_before_the_training_leaves_no_trace_of_it(tmp_path: Path, way: str) -> None:
    model, beside, objective = made(way)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {key: value.clone() for key, value in beside.state_dict().items()}
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=0) as recorder:
        with recorder.event("look", probe=[torch.randn(8, 6), torch.randn(8, 6)], mode="train"):
            pass
    assert all(torch.equal(value, before[key]) for key, value in beside.state_dict().items())
    assert (beside.depth if isinstance(beside, Entered) else beside.bank.times) == 0


def test_what_is_run_by_a_method_is_no_state_that_a_graph_could_repeat() -> None:
    model, _, objective = made("method")
    probe = Probe(model, objective, [torch.randn(8, 6)])
    probe.loss()
    assert not probe.repeatable
    plain = Probe(model, lambda model, x: model(x).square().mean(), [torch.randn(8, 6)])
    plain.loss()
    assert plain.repeatable


def test_modules_that_an_objective_refers_to() -> None:
    loss, other = Loss(), Bank()
    holder = SimpleNamespace(one=(loss, [other]))
    assert set(modules_of(lambda model, x: holder.one)) == {loss, loss.bank, other}
    assert modules_of(None) == []
    assert modules_of(lambda model, x: model(x)) == []
