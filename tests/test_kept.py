"""What forward passes and objectives keep in odd places is what it was after a probe, and in it what the step had."""

import copy
import functools
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import cross_entropy, losses_of_steps, vectors
from torch import Tensor, nn

from dynamics import Recorder
from dynamics.probing.kept import kept
from dynamics.probing.walk import MOST, walk

RANDOM = np.random.RandomState(0)  # of a module, as scripts have it

GLOBAL = 1.0


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


class Privately:
    __slots__ = ("__count",)

    def __init__(self) -> None:
        self.__count = 0

    def __call__(self) -> float:
        self.__count += 1
        return 1 / self.__count


class InATuple:
    def __init__(self) -> None:
        self.numbers = (torch.zeros(()), [], OrderedDict(a=1.0, b=2.0, c=3.0))

    def __call__(self) -> float:
        self.numbers[1].append(1)
        self.numbers[2].move_to_end(next(iter(self.numbers[2])))
        return self.numbers[0].add_(1).item() / len(self.numbers[1]) + next(iter(self.numbers[2].values()))


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


DRAWS: dict[str, Callable[[], Callable[[], float]]] = {
    "numpy's older generator": lambda: np.random.RandomState(0).rand,
    "numpy's generator": lambda: np.random.default_rng(0).random,
    "python's generator": lambda: random.Random(0).random,
    "torch's generator": lambda: functools.partial(torch.rand, (), generator=torch.Generator().manual_seed(0)),
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
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = losses_of_steps(path, model, optimizer, loss_of, vectors(5))
    return [*map(Tensor.tolist, model.parameters()), losses, random_numbers()]


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("where", ["model", "objective", "closure", "bound method"])
def test_what_is_drawn_is_the_steps(tmp_path: Path, name: str, where: str) -> None:
    results = []
    for path in (None, tmp_path / "run"):
        draw = Later(DRAWS[name])

        class Losses:
            def __init__(self, draw: Later) -> None:
                self.draw = draw

            def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
                return cross_entropy(model, (batch[0] * self.draw(), batch[1]))

        def noisy(model: nn.Module, batch: tuple[Tensor, Tensor], losses: Losses) -> Tensor:
            return losses.loss(model, batch)

        losses = Losses(draw)
        loss_of = {
            "model": cross_entropy, "objective": functools.partial(noisy, losses=losses),
            "closure": lambda model, batch, losses=losses: losses.loss(model, batch), "bound method": losses.loss,
        }[where]  # fmt: skip
        model = Keeping(draw) if where == "model" else nn.Linear(4, 3)
        results.append(trained(path, model, loss_of, draw))
    assert results[0] == results[1]


@pytest.mark.parametrize("make", [Slots, Privately, InATuple])
def test_what_a_models_object_counts_is_the_steps(tmp_path: Path, make: Callable[[], Callable[[], float]]) -> None:
    results = []
    for path in (None, tmp_path / "run"):
        count = make()
        results.append(trained(path, Keeping(count), cross_entropy, count))
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


class Trainer:
    """Holds the model, as trainers do, and is held by it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stop, self.numbers = model, False, [1]


class Trap:
    def __getattr__(self, name: str) -> object:
        raise KeyError(name)


class Metrics(dict):
    def update(self, **numbers: float) -> None:
        super().update(numbers)


@dataclass(frozen=True, slots=True)
class Frozen:
    number: float = 1.0


class Averaging(nn.Module):
    """Its helper holds another network, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.helper = nn.Linear(4, 3), Trainer(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.helper.numbers.append(1)
        return self.layer(x) / len(self.helper.numbers)


def test_a_helper_that_holds_another_network_counts_as_the_step_does(tmp_path: Path) -> None:
    one, other = (trained(path, Averaging(), cross_entropy, lambda: 0) for path in (None, tmp_path / "run"))
    assert one == other


class Making(nn.Module):
    """Makes its target in the first forward pass, as some make BYOL's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.target = nn.Linear(4, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.target is None:
            self.target = nn.Linear(4, 3).requires_grad_(False)
            self.target.load_state_dict(self.layer.state_dict())
        return self.layer(x) - self.target(x)


def test_a_module_that_the_first_forward_pass_makes_stays_the_models(tmp_path: Path) -> None:
    one = trained(None, Making(), cross_entropy, lambda: 0)
    with pytest.warns(UserWarning, match="parameters that were added after recording began are not recorded"):
        other = trained(tmp_path / "run", Making(), cross_entropy, lambda: 0)
    assert one == other


class Replacing(nn.Module):
    """A codebook that moves by averages: each forward pass makes a new parameter of it, as in a much used VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.codes = nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        chosen = F.one_hot(torch.cdist(z, self.codes.weight).argmin(1), 5).to(z.dtype)
        quantised = chosen @ self.codes.weight
        self.codes.weight = nn.Parameter(0.5 * self.codes.weight + 0.1 * chosen.T @ z)
        return z + (quantised - z).detach() + F.mse_loss(quantised.detach(), z)


def test_a_parameter_that_the_forward_pass_replaces_is_the_one_it_had(tmp_path: Path) -> None:
    one, other = (trained(path, Replacing(), cross_entropy, lambda: 0) for path in (None, tmp_path / "run"))
    assert one == other


def test_what_is_not_the_models_business_is_left_alone() -> None:
    model, data = nn.Linear(4, 3), torch.zeros(2**20 + 1)
    trained = torch.zeros(2, requires_grad=True)
    model.trainer = trainer = Trainer(model)

    def objective(model: nn.Module, batch: object) -> Tensor:
        return data.sum() + trained.sum() + trainer.numbers[0]

    put_back = kept(model.modules(), objective).put_back
    data.add_(1)
    with torch.no_grad():
        trained.add_(1)
    trainer.stop = True
    trainer.numbers.append(2)
    put_back()
    assert (data[0], trained.tolist(), trainer.stop, trainer.numbers) == (1, [1, 1], True, [1, 2])


def test_what_a_library_puts_into_a_module_stays_as_it_is_now() -> None:
    """A forward pass that it lends for a while, a hook, and a statistic."""
    model = nn.BatchNorm1d(3)
    model.forward = lambda x: 2 * x
    put_back = kept(model.modules()).put_back
    del model.forward
    model.register_forward_hook(lambda module, inputs, output: output + 5)
    model.running_mean.add_(1)
    put_back()
    assert model.eval()(torch.ones(1, 3)).tolist() == [[5.0] * 3]


def test_what_a_forward_pass_adds_to_its_class_is_taken_away() -> None:
    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            type(self).last = x
            return super().forward(x)

    model = Noting(4, 3)
    put_back = kept([model]).put_back
    model(torch.ones(1, 4))
    put_back()
    assert not hasattr(Noting, "last")


def test_variables_of_an_objective_are_put_back() -> None:
    model, numbers, tensor, array, baseline = nn.Linear(4, 3), [1, 2], torch.zeros(3), np.zeros(2), 0.5

    class Weights:
        def __init__(self) -> None:
            self.of_groups = torch.ones(2)

    weights, state = Weights(), {"centre": 1.0}

    def objective(model: nn.Module, batch: object) -> Tensor:
        return tensor.sum() + len(numbers) + array.sum() - baseline - GLOBAL + weights.of_groups.sum() + state["centre"]

    before = kept(model.modules(), objective)
    global GLOBAL
    of_tensor, of_array = tensor, array
    of_tensor.add_(1)
    tensor, baseline, GLOBAL = torch.ones(3), 0.75, 3.0
    numbers.append(3)
    of_array += 1
    weights.of_groups = torch.zeros(2)
    state["centre"] = 2.0
    now = kept(model.modules(), objective)
    before.put_back()
    assert tensor is of_tensor
    assert float(objective(model, None)) == 0 + 2 + 0 - 0.5 - 1 + 2 + 1
    now.put_back()
    assert float(objective(model, None)) == 3 + 3 + 2 - 0.75 - 3 + 0 + 2
    GLOBAL = 1.0


def test_a_tensor_behind_many_of_the_same_is_put_back() -> None:
    model, tensor = nn.Linear(4, 3), torch.zeros(3)
    ring, given = [*[None] * 5000, tensor], {**dict.fromkeys(range(5000)), "last": np.zeros(3)}

    def objective(model: nn.Module, batch: object) -> Tensor:
        return ring[-1].add_(1).sum() + (given["last"].__iadd__(1)).sum()

    before = kept(model.modules(), objective)
    objective(model, None)
    before.put_back()
    assert tensor.tolist() == given["last"].tolist() == [0, 0, 0]


def test_odd_objects_are_put_back_or_left_alone() -> None:
    model, chain = nn.Linear(4, 3), []
    for _ in range(5000):  # deeper than Python calls itself
        chain = [chain]
    model.metrics, model.frozen, model.trap, model.chain = Metrics(a=1.0), Frozen(), Trap(), chain
    model.constant = torch.tensor([1.0, torch.nan])
    model.temperature = torch.ones((), requires_grad=True)
    model.order = OrderedDict(a=1, b=2)
    model.history = first = [1.0]
    model.empty, model.fixed, model.sparse = np.zeros((0, 3)), np.broadcast_to(np.ones(1), 3), torch.eye(2).to_sparse()
    before = kept(model.modules())
    version = model.constant._version
    loss = model.temperature * 2
    model.metrics.update(b=2.0)
    model.order.move_to_end("a")
    first.append(2.0)
    assert not before.are_as(kept(model.modules()))
    before.put_back()
    assert (model.metrics, list(model.order), first) == ({"a": 1.0}, ["a", "b"], [1.0])
    assert before.are_as(kept(model.modules()))
    assert model.constant._version == version
    loss.backward()


def test_what_the_loop_has_taken_out_of_the_model_keeps_its_contents(tmp_path: Path) -> None:
    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.parts = nn.Linear(4, 3), []

        def forward(self, x: Tensor) -> Tensor:
            self.parts.append(len(x))
            return self.layer(x)

    model, history = Collecting(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            history.append(model.parts)
            history[-1].append("read")
            model.parts = []
            optimizer.step()
    assert history == [[16, "read"]] * 3
    assert model.parts == []


def test_a_scripted_part_is_no_hindrance(tmp_path: Path) -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.Tanh())
    assert kept(model.modules()).are_as(kept(model.modules()))


def test_what_an_objective_adds_to_an_object_is_taken_away() -> None:
    class Weights:
        first = 1.0

    weights, scalar = Weights(), np.array(0.5)

    def objective(model: nn.Module, batch: object) -> Tensor:
        weights.second = 2.0
        scalar[...] += 1
        return model.weight.sum() * weights.first

    model = nn.Linear(4, 3)
    before = kept(model.modules(), objective)
    objective(model, None)
    assert not before.are_as(kept(model.modules(), objective))
    before.put_back()
    assert vars(weights) == {}
    assert scalar == 0.5
    assert before.are_as(kept(model.modules(), objective))


def test_a_variable_that_an_objective_has_not_been_given_yet(tmp_path: Path) -> None:
    def make() -> Callable:
        def objective(model: nn.Module, batch: list[Tensor]) -> Tensor:
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            return loss if len(batch) == 2 else loss * scale

        if tmp_path is None:
            scale = 2.0
        return objective

    trained(tmp_path / "run", nn.Linear(4, 3), make(), lambda: None)


def test_a_copy_of_a_model_that_refers_to_its_recorder(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    model.recorder = recorder = Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    assert copy.deepcopy(model).recorder is recorder
    assert pickle.loads(pickle.dumps(model)).recorder is None
    recorder.close()


def test_a_bounded_walk_reads_no_long_container_to_its_end() -> None:
    numbers = iter(range(100_000))
    walk(["all"], lambda value: numbers if value == "all" else (), bounded=True)
    assert next(numbers) <= MOST
