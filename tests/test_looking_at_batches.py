"""To see whether a loop has changed its batch, the recorder looks at it: none of its code runs, in no time."""

import signal
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import is_of_its_steps
from networks import step_along, vectors
from torch import Tensor, nn

from dynamics import Recorder
from dynamics.loop.backward_passes import BackwardPasses
from dynamics.loop.moments import Moments
from dynamics.loop.seen import Seen
from dynamics.probing.batch import copied
from dynamics.probing.changes import changed_since
from dynamics.probing.objective import cross_entropy_objective


class Sample:
    """Inputs and labels, and whatever else."""

    def __init__(self, x: Tensor, y: Tensor, other: Any = None) -> None:
        self.x, self.y, self.other = x, y, other


class Eager:
    """Its property is the user's own code, which fails."""

    @property
    def mean(self) -> float:
        raise RuntimeError("not ready")


def shared() -> Any:
    """Each object twice in the next: there are 2³⁰ ways to the first."""
    value = Eager()
    for _ in range(30):
        value = Sample(value, value)
    return value


def chained() -> Any:
    """Each object in the next, deeper than Python recurses."""
    value = Eager()
    for _ in range(3000):
        value = Sample(value, None)
    return value


def itself(sample: Sample) -> Sample:
    sample.other = [sample, {"again": sample}]
    return sample


ODD: dict[str, Callable[[], Any]] = {
    "a function": lambda: vectors,
    "a module": lambda: torch,
    "a generator": lambda: (number for number in range(3)),
    "a property that raises": Eager,
    "objects that share others": shared,
    "a chain of objects": chained,
    "many words": lambda: [f"word {number}" for number in range(20_000)],
}


@pytest.fixture
def in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("a batch is looked at for too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def objective(model: nn.Module, sample: Sample) -> Tensor:
    return F.cross_entropy(model(sample.x), sample.y)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("what", [*ODD, "itself"])
def test_a_batch_that_refers_to_anything(tmp_path: Path, what: str) -> None:
    """The loop adds noise to it, with which it is measured."""
    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    samples = [Sample(x, y, None if what == "itself" else ODD[what]()) for x, y in vectors(3)]
    samples = list(map(itself, samples)) if what == "itself" else samples
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for sample in recorder.watch(samples):
            if what not in ("a module", "a generator", "a chain of objects"):  # these cannot be copied
                sample.x = sample.x + torch.randn_like(sample.x)
            losses.append(step_along(objective(model, sample), optimizer))
    is_of_its_steps(tmp_path / "run", losses)


class Loaded(Mapping):
    """Loads a part when it is asked for it, with noise."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._parts, self.loads = {"x": x, "y": y}, 0

    def __getitem__(self, key: str) -> Tensor:
        self.loads += 1
        return self._parts[key] + (torch.randn(()) if key == "x" else 0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def test_a_batch_that_loads_what_it_is_asked_for_is_asked_by_its_copy_alone(tmp_path: Path) -> None:
    """And draws no numbers of the loop's, which trains as it would by itself."""

    def trained(path: Path | None) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
        optimizer, batches = torch.optim.SGD(model.parameters(), 0.1), [Loaded(x, y) for x, y in vectors(3)]

        def loss(model: nn.Module, batch: Mapping) -> Tensor:
            return F.cross_entropy(model(batch["x"]), batch["y"])

        def train(watched: Any) -> None:
            for batch in watched:
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()

        if path is None:
            train(batches)
        else:
            with Recorder(path, model, optimizer, objective=loss, curvature_every=1) as recorder:
                train(recorder.watch(batches))
        return [one.detach() for one in model.parameters()], [batch.loads for batch in batches]

    plain, loads = trained(None)
    recorded, all_loads = trained(tmp_path / "run")
    assert all(map(torch.equal, plain, recorded))
    assert all_loads == [2 * of_loop for of_loop in loads]


def test_a_large_array_is_compared_with_the_copy_that_there_is() -> None:
    batch = {"x": np.ones(2**22), "y": torch.zeros(3)}  # 32 megabytes
    seen = copied(batch)
    tracemalloc.start()
    changed = changed_since(batch, seen)
    assert changed() is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
    batch["x"][-1] = 2
    np.testing.assert_array_equal(changed()["x"], batch["x"])


def test_a_batch_that_is_read_ahead_is_held_once_however_often_a_step_begins() -> None:
    model, (batch, *_) = nn.Linear(4, 3), vectors(1)
    backward = BackwardPasses(lambda: list(model.parameters()), averaged=False)
    moments = Moments(model, torch.device("cpu"), cross_entropy_objective, backward, lambda: list(model.parameters()))
    seen = Seen(batch, None)
    moments.keep(seen)
    first = seen.batch
    moments.keep(seen)
    assert seen.batch is first
    assert seen.batch[0] is not batch[0]
    batch[0].add_(1)
    assert torch.equal(seen.changed_since()[0], batch[0])
