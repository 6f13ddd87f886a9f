"""A watched loader is the loader: it draws when the loader would, and gives what the loader gives, in every way."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import plain_step, smooth_network, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, open_run

Watch = Callable[[Iterable], Iterable]


def shuffled() -> DataLoader:
    data = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 4, generator=data), torch.arange(24) % 3), 8, shuffle=True)


def two_side_by_side(watch: Watch) -> Iterator[list[Tensor]]:
    for (x, y), (other, _) in zip(watch(shuffled()), watch(shuffled()), strict=True):
        yield [x + other, y]


def something_drawn_before_the_first(watch: Watch) -> Iterator[list[Tensor]]:
    batches = iter(watch(shuffled()))
    noise = torch.randn(8, 4)
    for x, y in batches:
        yield [x + noise, y]


@pytest.mark.parametrize("loop", [two_side_by_side, something_drawn_before_the_first])
def test_random_numbers_are_drawn_in_the_loaders_order(tmp_path: Path, loop: Callable) -> None:
    def trained(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=0) if record else None
        for x, y in loop(recorder.watch if record else iter):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if recorder:
            recorder.close()
        return [*model.parameters(), torch.get_rng_state()]

    assert all(map(torch.equal, trained(record=False), trained(record=True)))


def test_an_iterator_stays_one(tmp_path: Path) -> None:
    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from shuffled()

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        batches = recorder.watch(endless())
        for _ in range(5):
            x, y = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert batches
        with pytest.raises(TypeError, match="not an iterator"):
            next(recorder.watch(shuffled()))
    run = open_run(tmp_path / "run")
    assert run.curvature.loss_before.values == pytest.approx(losses)
    assert run.steps.epoch.values.tolist() == [0] * 5


@pytest.mark.parametrize("of_iterator", [True, False])
def test_a_loader_that_fails_once_goes_on(tmp_path: Path, of_iterator: bool) -> None:
    class Failing:
        def __init__(self) -> None:
            self.number = 0

        def __iter__(self) -> "Failing":
            return self

        def __next__(self) -> int:
            self.number += 1
            if self.number == 2:
                raise OSError("a file that cannot be read")
            if self.number > 4:
                raise StopIteration
            return self.number

    model = nn.Linear(4, 3)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), curvature_every=0) as recorder:
        batches = recorder.watch(Failing())
        batches = batches if of_iterator else iter(batches)
        assert next(batches) == 1
        with pytest.raises(OSError, match="cannot be read"):
            next(batches)
        assert list(batches) == [3, 4]
        with pytest.warns(UserWarning, match="the optimizer took no step"):
            recorder.close()


@pytest.mark.parametrize("every", [2, 64])
@pytest.mark.parametrize("seen", [True, False])
def test_a_loader_that_was_not_watched_is_said(tmp_path: Path, seen: bool, every: int) -> None:
    """Also if of four steps the first alone was due."""
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nullcontext() if seen else pytest.warns(UserWarning, match="no batch was seen, so no curvature was recorded"):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=every) as recorder:
            for batch in recorder.watch(batches) if seen else batches:
                plain_step(model, optimizer, batch)


def test_a_watched_loader_can_be_copied(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        watched = recorder.watch([1, 2])
        assert list(map(len, (copy.copy(watched), copy.deepcopy(watched)))) == [2, 2]
