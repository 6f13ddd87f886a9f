"""What a loss refers to besides the model, such as a memory bank: as it was, whichever of its methods is called."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import curvature_by_hand
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.probing.probe import Probe
from dynamics.probing.references import modules_of


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
METHODS = ("method", "in a list", "in a dictionary", "in a library's object")


def made(way: str) -> tuple[nn.Module, nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A model, what is beside it, and the objective."""
    kind, objective = WAYS[way]
    model, beside = nn.Linear(6, 4), kind()
    return model, beside, objective(beside)


def is_measured_as_it_was(path: Path, model: nn.Module, objective: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Assert that the losses of a training are recorded, as of before each step."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder:
        for _ in range(3):
            recorder.observe(x := torch.randn(8, 6))
            losses.append(objective(model, x))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    np.testing.assert_allclose(open_run(path).curvature.loss_before, [one.item() for one in losses], 1e-12)


@pytest.mark.filterwarnings("ignore:the gradient applied")  # of what nobody tells when it runs
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
    if way in METHODS:  # of which nobody tells when they run: they are measured as they are then
        return
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


@pytest.mark.parametrize("runs", [True, False])
def test_what_is_run_by_a_method_is_no_state_that_a_graph_could_repeat(runs: bool) -> None:
    model, beside = nn.Linear(6, 4), Loss()
    probe = Probe(model, lambda model, x: beside.measure(model(x)) if runs else model(x).sum(), [torch.randn(8, 6)])
    probe.doubted = True
    probe.loss()
    assert probe.repeatable != runs


UNRELATED = nn.BatchNorm1d(4)


def test_modules_that_an_objective_refers_to() -> None:
    loss, other = Loss(), Bank()
    holder = SimpleNamespace(one=(loss, [other]))
    assert set(modules_of(lambda model, x: holder.one)) == {loss, loss.bank, other}
    assert modules_of(None) == []
    assert modules_of(lambda model, x: model(x)) == []
    assert modules_of(lambda model, x: UNRELATED) == [UNRELATED]


class Loading(Mapping):
    """A data set that loads what one looks at."""

    loaded = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __getitem__(self, key: int) -> Tensor:
        self.loaded += 1
        return torch.randn(6)


class Listed(list):
    def __iter__(self) -> Iterator[Any]:
        torch.randn(1)
        return super().__iter__()


class Trainer:
    """Holds much that its loss does not use."""

    def __init__(self, loss: nn.Module) -> None:
        self.data, self.items, self.loss = Loading(), Listed([1, 2]), loss
        self.lazy, self.scripted, self.busy = nn.LazyBatchNorm1d(), torch.jit.script(nn.Linear(2, 2)), Bank()
        self.loss.items = Listed([1.0, 2.0])

    def objective(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.loss.measure(model(x))


@pytest.mark.filterwarnings("ignore:the gradient applied")
def test_nothing_that_the_loss_does_not_use_is_touched(tmp_path: Path) -> None:
    """No code of its own runs, and what another thread or a graph of the loop has of it stays as it is."""
    losses = {}
    for recorded in (False, True):
        torch.manual_seed(0)
        model, trainer = nn.Linear(6, 4), Trainer(Loss())
        scale = torch.ones(4)
        trainer.busy.scale = scale
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        losses[recorded] = []
        with Recorder(tmp_path / f"{recorded}", model, optimizer, objective=trainer.objective,
                      curvature_every=recorded) as recorder:  # fmt: skip
            for _ in range(3):
                x = torch.randn(8, 6)
                recorder.observe(x)
                loss = trainer.objective(model, x)
                other = (torch.ones(4, requires_grad=True) * scale).sum()  # its graph keeps the scale
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                other.backward()
                losses[recorded].append(loss.item())
        assert trainer.data.loaded == 0
    assert losses[True] == losses[False]
    assert open_run(tmp_path / "True").curvature.sizes["step"] == 3


def test_a_buffer_that_two_losses_share_is_shared_where_it_is_measured() -> None:
    model, first, second = nn.Linear(6, 4), Bank(), Bank()
    second.mean = first.mean

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        first.mean.fill_(2.0)
        return (model(x) * second.mean).sum()

    x = torch.randn(8, 6)
    np.testing.assert_allclose(Probe(model, objective, [x]).loss().item(), 2 * model(x).sum().item(), 1e-12)
    assert second.mean is first.mean
    assert not first.mean.any()


def test_a_buffer_that_a_method_fills_before_its_graph_keeps_it(tmp_path: Path) -> None:
    """Putting it back in place would end the evaluation's own backward pass."""
    model, bank = nn.Linear(6, 4), Bank()

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        bank.mean.fill_(x.mean())
        return (bank.mean * model(x)).square().mean()

    is_measured_as_it_was(tmp_path / "run", model, objective)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore:.torch.jit.trace_method")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_scripted_teacher(tmp_path: Path, mode: str) -> None:
    teacher = torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).train(mode == "train"))
    model = nn.Linear(6, 4)

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - teacher(x)).square().mean()

    is_measured_as_it_was(tmp_path / "run", model, objective)
    assert teacher[1].num_batches_tracked == (3 if mode == "train" else 0)


def test_what_another_thread_runs_meanwhile_stays(tmp_path: Path) -> None:
    """Its calls are told apart by their hooks."""
    model, trainer = nn.Linear(6, 4), Trainer(Loss())

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        thread = Thread(target=trainer.busy, args=(torch.ones(2, 4),))
        thread.start()
        thread.join()
        return trainer.loss.measure(model(x))

    Probe(model, objective, [torch.randn(8, 6)]).loss()
    assert trainer.busy.times == 1
    assert trainer.busy.mean.any()
    assert trainer.loss.bank.times == 0


class Whole(nn.Module):
    """Runs one of two parts by itself, the other one only if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Bank(), Bank()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


def test_a_part_that_is_called_by_itself_before_the_whole_is_measured_as_it_was_called(tmp_path: Path) -> None:
    model, whole = nn.Linear(6, 4), Whole()

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        outputs = model(x)
        return whole.first(outputs) + whole(outputs)

    is_measured_as_it_was(tmp_path / "run", model, objective)
