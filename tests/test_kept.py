"""What forward passes and objectives keep in odd places is what it was after a probe, and in it what the step had."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.kept import kept

RANDOM = np.random.RandomState(0)  # of a module, as scripts have it


class Slots:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return 1 / self.count


class Keeping(nn.Module):
    """Multiplies by what it draws or counts."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(4, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.draw()


class OfItsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * RANDOM.rand()


class Counting(nn.Module):
    """Counts in its class how often it ran, as some do."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        Counting.calls += 1
        type(self).last = Counting.calls
        return self.layer(x) / Counting.calls


def drawn_tuple() -> Callable[[], float]:
    kept_in_tuple = (torch.zeros(()), [])

    def draw() -> float:
        kept_in_tuple[1].append(1)
        return kept_in_tuple[0].add_(1).item()

    return draw


def counted() -> Callable[[], float]:
    count = 0

    def draw() -> float:
        nonlocal count
        count += 1
        return 1 / count

    return draw


DRAWS: dict[str, Callable[[], Callable[[], float]]] = {
    "numpy's older generator": lambda: np.random.RandomState(0).rand,
    "numpy's generator": lambda: np.random.default_rng(0).random,
    "python's generator": lambda: random.Random(0).random,
    "torch's generator": lambda: functools.partial(torch.rand, (), generator=torch.Generator().manual_seed(0)),
    "slots": Slots,
    "a tuple": drawn_tuple,
    "a variable outside": counted,
}


class Later:
    """Draws what is given once it is called: bound methods of C's classes do not say whose they are."""

    def __init__(self, make: Callable[[], Callable[[], float]]) -> None:
        self.draw = make()
        self.owner = getattr(self.draw, "__self__", None)

    def __call__(self) -> float:
        return self.draw()


def trained(path: Path | None, model: nn.Module, loss_of: Callable, random_numbers: Callable[[], object]) -> list:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    recorder = Recorder(path, model, optimizer, objective=loss_of, curvature_every=1) if path else None
    for batch in recorder.watch(vectors(4)) if recorder else vectors(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if recorder:
        recorder.close()
        np.testing.assert_allclose(open_run(path)["curvature"].loss_before, losses, rtol=1e-12)
    return [*map(Tensor.tolist, model.parameters()), losses, random_numbers()]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("where", ["model", "objective"])
def test_what_is_drawn_or_counted_is_the_steps(tmp_path: Path, name: str, where: str) -> None:
    results = []
    for path in (None, tmp_path / "run"):
        draw = Later(DRAWS[name])
        model = Keeping(draw) if where == "model" else nn.Linear(4, 3)

        def noisy(model: nn.Module, batch: tuple[Tensor, Tensor], draw: Callable = draw) -> Tensor:
            return cross_entropy(model, (batch[0] * draw(), batch[1]))

        loss_of = cross_entropy if where == "model" else functools.partial(noisy, draw=draw)
        results.append(trained(path, model, loss_of, draw))
    assert results[0] == results[1]


def test_what_a_forward_pass_finds_in_its_module(tmp_path: Path) -> None:
    results = []
    for path in (None, tmp_path / "run"):
        RANDOM.seed(0)
        results.append(trained(path, OfItsModule(), cross_entropy, RANDOM.rand))
    assert results[0] == results[1]


def test_what_a_forward_pass_counts_in_its_class(tmp_path: Path) -> None:
    results = []
    for path in (None, tmp_path / "run"):
        Counting.calls = 0
        if "last" in vars(Counting):
            del Counting.last
        results.append(trained(path, Counting(), cross_entropy, lambda: (Counting.calls, Counting.last)))
    assert results[0] == results[1]


def test_a_number_that_the_loop_changes_before_the_step(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer, losses, weight = torch.optim.SGD(model.parameters(), 0.1), [], 0.0

    def annealed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return weight * cross_entropy(model, batch)

    with Recorder(tmp_path / "run", model, optimizer, objective=annealed, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            weight += 0.25
            optimizer.zero_grad()
            loss = annealed(model, batch)
            loss.backward()
            weight += 0.25
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
    assert weight == 2.0


def test_what_is_large_and_what_is_not_the_losss_business_is_left_alone() -> None:
    model, large, small = nn.Linear(4, 3), torch.zeros(1000), torch.zeros(3)
    optimizer, numbers = torch.optim.SGD(model.parameters(), 0.1), list(range(100_000))

    def objective(model: nn.Module, batch: object) -> Tensor:
        return large.sum() + small.sum() + len(numbers) + len(optimizer.param_groups)

    put_back = kept(model.modules(), objective).put_back
    with torch.no_grad():
        for one in (large, small):
            one.add_(1)
    numbers.append(0)
    optimizer.param_groups[0]["lr"] = 0.2
    put_back()
    assert small.eq(0).all()
    assert large.eq(1).all()
    assert (len(numbers), optimizer.param_groups[0]["lr"]) == (100_001, 0.2)
