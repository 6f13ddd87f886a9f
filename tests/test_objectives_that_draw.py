"""An objective that draws from the loop's iterators takes nothing from the loop: curvature ends, with a reason."""

from __future__ import annotations

import csv
import itertools
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import away_from_the_model as away
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batch, step_along, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, open_run
from dynamics.probing.undrawn import is_iterator, undrawn

unlabelled: Iterator


def pool() -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(240.0).reshape(60, 4).sin()), 4, shuffle=True)


def semi_supervised(model: nn.Module, batch: Batch, more: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + model(more).softmax(1).square().mean()


def from_a_closure() -> Callable:
    more = iter(pool())
    return lambda model, batch: semi_supervised(model, batch, next(more)[0])


def from_a_cycle() -> Callable:
    more = itertools.cycle([points for points, _ in vectors(5)])
    return lambda model, batch: semi_supervised(model, batch, next(more))


def from_a_global() -> Callable:
    global unlabelled
    unlabelled = (points for points, _ in itertools.cycle(vectors(5)))
    return lambda model, batch: semi_supervised(model, batch, next(unlabelled))


def from_another_module() -> Callable:
    away.UNLABELLED = iter(pool())
    return lambda model, batch: semi_supervised(model, batch, next(away.UNLABELLED)[0])


def from_a_dictionary() -> Callable:
    loaders = {"unlabelled": iter(pool())}
    return lambda model, batch: semi_supervised(model, batch, next(loaders["unlabelled"])[0])


def from_a_dictionary_in_another() -> Callable:
    loaders = {"train": {"unlabelled": iter(pool())}}
    return lambda model, batch: semi_supervised(model, batch, next(loaders["train"]["unlabelled"])[0])


def from_a_default() -> Callable:
    return lambda model, batch, more=iter(pool()): semi_supervised(model, batch, next(more)[0])  # noqa: B008


def from_an_argument() -> Callable:
    def loss(model: nn.Module, batch: Batch, more: Iterator) -> Tensor:
        return semi_supervised(model, batch, next(more)[0])

    return partial(loss, more=iter(pool()))


class Trainer:
    def __init__(self) -> None:
        self.loader = pool()
        self.more = iter(self.loader)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return semi_supervised(model, batch, next(self.more)[0])


class Drawing(nn.Linear):
    """Its forward pass adds what comes next."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.noise = itertools.cycle([0.1, 0.2, 0.3, 0.4, 0.5])

    def forward(self, points: Tensor) -> Tensor:
        return super().forward(points + next(self.noise))


def train(model: nn.Module, loss_of: Callable, batches: list, path: Path | None) -> list[Tensor]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    recorder = path and Recorder(path, model, optimizer, objective=loss_of, curvature_every=1)
    for batch in recorder.watch(batches) if recorder else batches:
        step_along(loss_of(model, batch), optimizer)
    if recorder:
        recorder.close()
    return [parameter.detach().clone() for parameter in model.parameters()]


def stays_the_same(tmp_path: Path, network: Callable, make: Callable, batches: Callable[[], list], count: int) -> None:
    ends = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(0)
        model, loss_of = network(), make()
        if path is None:
            ends.append(train(model, loss_of, batches(), path))
        else:
            with pytest.warns(UserWarning, match="not recorded from step 0 on: .* draws from an iterator, a .*observe"):
                ends.append(train(model, loss_of, batches(), path))
    assert all(map(torch.equal, *ends))
    run = open_run(tmp_path / "run")
    assert run.steps.sizes["step"] == count
    assert np.isfinite(run.steps.grad_sqnorm).all()


@pytest.mark.parametrize(
    "make",
    [
        from_a_closure,
        from_a_cycle,
        from_a_global,
        from_another_module,
        from_a_dictionary,
        from_a_dictionary_in_another,
        from_a_default,
        from_an_argument,
        lambda: Trainer().loss,
    ],
)
def test_what_an_objective_would_draw_stays_the_loops(tmp_path: Path, make: Callable) -> None:
    stays_the_same(tmp_path, lambda: nn.Linear(4, 3), make, lambda: vectors(4), 4)


def test_what_a_network_would_draw_stays_the_loops(tmp_path: Path) -> None:
    def make() -> Callable:
        return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])

    stays_the_same(tmp_path, Drawing, make, lambda: vectors(4), 4)


def test_a_batch_that_is_a_generator_stays_the_loops(tmp_path: Path) -> None:
    def make() -> Callable:
        return lambda model, parts: sum(F.cross_entropy(model(points), labels) for points, labels in parts)

    stays_the_same(tmp_path, lambda: nn.Linear(4, 3), make, lambda: [(one for one in vectors(2)) for _ in range(3)], 3)


def test_an_iterator_of_ones_own_is_put_back(tmp_path: Path) -> None:
    class Rounds:
        def __init__(self) -> None:
            self.place = 0

        def __next__(self) -> float:
            self.place += 1
            return 0.1 * self.place

    model, rounds, losses = nn.Linear(4, 3), Rounds(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) * next(rounds)

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            losses.append(step_along(objective(model, batch), optimizer))
    assert rounds.place == 4
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def record(path: Path, objective: Callable, batches: list) -> None:
    """Train with an objective that is no loop's, and ignore why its curvature ends."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        warnings.catch_warnings(),
        Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder,
    ):
        warnings.simplefilter("ignore")
        for points, labels in recorder.watch(batches):
            step_along(F.cross_entropy(model(points), labels), optimizer)


def test_an_iterator_that_another_thread_renews_meanwhile_is_left(tmp_path: Path) -> None:
    class Source:
        more: Iterator

    source, renewed = Source(), []
    source.more = iter([0])

    def renew() -> None:
        renewed.append(iter([1]))
        source.more = renewed[-1]

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        assert source.more is not None
        thread = threading.Thread(target=renew)
        thread.start()
        thread.join()
        return F.cross_entropy(model(batch[0]), batch[1])

    model = nn.Linear(4, 3)
    with undrawn(model.modules(), objective):
        objective(model, vectors(1)[0])
    assert source.more is renewed[-1]


def test_an_iterator_that_the_objective_hands_on_can_be_drawn_from_afterwards(tmp_path: Path) -> None:
    more, handed = iter(range(3)), queue.Queue()

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        handed.put(more)
        return F.cross_entropy(model(batch[0]), batch[1])

    record(tmp_path / "run", objective, vectors(2))
    assert next(handed.get()) == 0
    assert next(more) == 1


def test_iterators_that_the_objective_takes_from_a_list_are_put_back(tmp_path: Path) -> None:
    one, two = iter(range(3)), iter(range(3))
    turns = [one, two]

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        more = turns.pop(0)
        scale = 1 + next(more)
        turns.append(more)
        return F.cross_entropy(model(batch[0]), batch[1]) * scale

    record(tmp_path / "run", objective, vectors(2))
    assert turns == [one, two]


def test_an_iterator_that_is_only_looked_at_keeps_its_attributes(tmp_path: Path) -> None:
    rows = csv.DictReader(["points,label", "1,2"])

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) / len(rows.fieldnames)

    record(tmp_path / "run", objective, vectors(2))
    assert np.isfinite(open_run(tmp_path / "run")["curvature"].grad_hess_grad).all()


def test_a_long_list_is_not_searched_for_iterators_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = itertools.count()
    many = list(range(100_000))

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).sum() * len(many)

    monkeypatch.setattr("dynamics.probing.undrawn.is_iterator", lambda value: next(seen) < 0 or is_iterator(value))
    with undrawn((), objective):
        pass
    assert next(seen) < 10_000


def test_a_generator_that_is_sent_to_is_drawn_from(tmp_path: Path) -> None:
    def numbers() -> Iterator[float]:
        scale = 1.0
        while True:
            scale = (yield scale) or scale

    def make() -> Callable:
        more = numbers()
        next(more)
        return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]) * more.send(0.5)

    stays_the_same(tmp_path, lambda: nn.Linear(4, 3), make, lambda: vectors(3), 3)
