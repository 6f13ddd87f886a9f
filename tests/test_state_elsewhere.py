"""State that a forward pass or a loss keeps elsewhere than in the model: in other modules, classes or libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import away_from_the_model as away
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import cross_entropy, losses_of_steps, vectors
from scipy.stats import qmc
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from dynamics.probing.bytecode import names_in
from dynamics.probing.generators import drawing
from dynamics.probing.kept import kept
from dynamics.probing.references import variables_of

Change = Callable[[Tensor], Tensor]
STEP, READY = 0, False
LAYER = nn.Identity()
OPTIMIZERS: list[torch.optim.Optimizer] = []
QUEUE: list[Any] = []
CENTRE: Tensor | None = None
RING, BANK, TABLE = np.zeros(3), torch.zeros(3), dict.fromkeys(range(2000), 0)


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)


class Keeping(Net):
    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.change(x))


class ByMethod(Net):
    def augmented(self, x: Tensor) -> Tensor:
        return away.noise(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.augmented(x))


class ByInherited(ByMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ByProperty(Net):
    @property
    def factor(self) -> float:
        return away.RNG.random()

    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class InAComprehension(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([row * away.RNG.random() for row in x]))


class InAGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        global STEP
        STEP += 1
        return super().forward(x) / STEP


class MadeOnce(Net):
    """Makes a layer in its first forward pass, and notes that in a flag, or by what it counts."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        global STEP, READY, LAYER
        if not (READY if self.by == "flag" else STEP):
            LAYER, READY = nn.Linear(4, 4), True
            OPTIMIZERS[-1].add_param_group({"params": list(LAYER.parameters())})
        STEP += 1
        return super().forward(LAYER(x))


class Registering(Net):
    """Registers something that no second time can be, and notes that."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        global READY
        if not {"flag": READY, "list": QUEUE, "dictionary": away.DONE}[self.by]:
            (away.FOLDER / "registered").mkdir()
            READY, away.DONE["it"] = True, 1
            QUEUE.append(self)
        return super().forward(x)


class Centered(Net):
    """Has a centre that is made of the first batch."""

    def forward(self, x: Tensor) -> Tensor:
        global CENTRE
        CENTRE = x.mean(0) if CENTRE is None else 0.9 * CENTRE + 0.1 * x.mean(0)
        return super().forward(x - CENTRE)


class Collecting(Net):
    """Collects an auxiliary loss, which the loss adds up and takes away."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        away.LOSSES.append(outputs.square().mean())
        return outputs


def with_auxiliary(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1]) + sum(away.LOSSES)
    away.LOSSES.clear()
    return loss


class Reading(Net):
    """Reads what others change meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (STEP + len(QUEUE) + RING[0] + BANK[0] + len(TABLE)) * away.COUNTS["step"]


class WithALoss(Net):
    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(away.noise(batch[0])), batch[1])


def in_a_dictionary(x: Tensor) -> Tensor:
    away.COUNTS["step"] += 1
    return x / away.COUNTS["step"]


def by_another_name(x: Tensor) -> Tensor:
    counts = away.COUNTS
    counts["step"] += 1
    return x / counts["step"]


def by_key(x: Tensor) -> Tensor:
    row = away.LISTS.get("steps", [])
    row[0] += 1
    return x / (1 + row[0])


def in_a_loop(x: Tensor) -> Tensor:
    for row in away.LISTS.values():
        row[len(x) % 4 * 0] += 1
    return x / (1 + away.LISTS["steps"][0])


def in_a_list_in_a_dictionary(x: Tensor) -> Tensor:
    away.LISTS["steps"].append(1)
    return x / len(away.LISTS["steps"])


def in_a_table(x: Tensor) -> Tensor:
    TABLE[0] += 1
    return x


def in_a_class(x: Tensor) -> Tensor:
    away.Config.step += 1
    return x / away.Config.step


def in_an_object(x: Tensor) -> Tensor:
    away.CONFIG.step_of_object += 1
    return x / away.CONFIG.step_of_object


def in_a_closure() -> Change:
    step = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal step
        step += 1
        return x / step

    return counted


def counted_by(config: away.Config) -> Callable[[], int]:
    config.step_of_object += 1
    return lambda: config.step_of_object


def of_a_library() -> Change:
    from transforms import Transform  # type: ignore[import-not-found]  # written by _reset

    return Transform()


def of_torch() -> Change:
    engine = SobolEngine(4, scramble=True, seed=0)
    return lambda x: x + engine.draw(len(x), dtype=x.dtype)


def of_scipy() -> Change:
    engine = qmc.Halton(4, rng=0)
    return lambda x: x + torch.from_numpy(engine.random(len(x)))


CHANGES: dict[str, Callable[[], Change]] = {
    "a function's generator": lambda: away.noise,
    "through another function": lambda: away.through_another,
    "another module's generator": lambda: lambda x: x * away.RNG.random(),
    "in a list in a dictionary": lambda: lambda x: x * away.SETTINGS["augment"][0].random(),
    "a class's generator": lambda: lambda x: x * away.CONFIG.rng.random(),
    "an object that is called": lambda: lambda x: away.AUGMENTATION(x),
    "another module's number": lambda: away.counted,
    "in a dictionary": lambda: in_a_dictionary,
    "in a dictionary by another name": lambda: by_another_name,
    "in a loop over a dictionary": lambda: in_a_loop,
    "in what a dictionary returns": lambda: by_key,
    "in a list in a dictionary that is changed": lambda: in_a_list_in_a_dictionary,
    "in a class": lambda: in_a_class,
    "in an object": lambda: in_an_object,
    "in an object that is given": lambda: lambda x: x / counted_by(away.CONFIG)(),
    "in a closure": in_a_closure,
    "a library's generator": of_a_library,
    "torch's sequence": of_torch,
    "SciPy's sequence": of_scipy,
}
TRANSFORM = """
from numpy.random import RandomState

class Rotation:
    def __init__(self):
        self.rng = RandomState(0)
    def __call__(self, x):
        return x * self.rng.rand()

class Transform:
    def __init__(self):
        self.transforms = [None, Rotation()]
    def __call__(self, x):
        return self.transforms[1](x)
"""


@pytest.fixture(autouse=True)
def _reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "transforms.py").write_text(TRANSFORM)
    monkeypatch.syspath_prepend(installed)
    monkeypatch.delitem(sys.modules, "transforms", raising=False)
    monkeypatch.setattr(away, "FOLDER", tmp_path)


def trained(path: Path | None, make: Callable[[], tuple[nn.Module, Callable]]) -> list:
    global STEP, READY, CENTRE
    STEP, READY, CENTRE = 0, False, None
    away.reset()
    torch.manual_seed(0)
    model, loss_of = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    OPTIMIZERS.append(optimizer)
    losses = losses_of_steps(path, model, optimizer, loss_of, vectors(5))
    return [*map(Tensor.tolist, model.parameters()), losses, away.STEP, away.COUNTS["step"], away.RNG.random()]


def stays_the_same(path: Path, make: Callable[[], tuple[nn.Module, Callable]]) -> None:
    assert trained(None, make) == trained(path / "run", make)


@pytest.mark.parametrize("where", ["model", "objective"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_as_in_the_step_and_stays_the_loops(tmp_path: Path, change: str, where: str) -> None:
    def make() -> tuple[nn.Module, Callable]:
        changed = CHANGES[change]()
        if where == "model":
            return Keeping(changed), cross_entropy
        return Net(), lambda model, batch: F.cross_entropy(model(changed(batch[0])), batch[1])

    stays_the_same(tmp_path, make)


@pytest.mark.parametrize("network", [ByMethod, ByInherited, ByProperty, InAComprehension, InAGlobal])
def test_a_forward_pass_that_reaches_it_on_its_way(tmp_path: Path, network: type[nn.Module]) -> None:
    stays_the_same(tmp_path, lambda: (network(), cross_entropy))


def test_a_method_of_the_model_that_the_objective_calls(tmp_path: Path) -> None:
    stays_the_same(tmp_path, lambda: (WithALoss(), lambda model, batch: model.loss(batch)))


@pytest.mark.parametrize("by", ["flag", "count"])
def test_a_layer_that_is_made_in_the_first_forward_pass_stays_the_loops(tmp_path: Path, by: str) -> None:
    layers = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(0)
        trained(path, lambda: (MadeOnce(by), cross_entropy))
        layers.append([one.tolist() for one in LAYER.parameters()])
    assert layers[0] == layers[1]


@pytest.mark.parametrize("by", ["flag", "list", "dictionary"])
def test_what_is_done_once_for_all_is_not_done_again(tmp_path: Path, by: str) -> None:
    QUEUE.clear()
    trained(tmp_path / "run", lambda: (Registering(by), cross_entropy))
    QUEUE.clear()


@pytest.mark.parametrize("where", ["in a variable", "around it"])
def test_a_switch_that_an_objective_turns_is_turned_back(tmp_path: Path, where: str) -> None:
    def make() -> tuple[nn.Module, Callable]:
        on = True

        def in_a_variable(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            global READY
            READY = not READY
            return cross_entropy(model, (batch[0] * (1 + READY), batch[1]))

        def around_it(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal on
            loss = cross_entropy(model, batch) * (10 if on else 1)
            on = False
            return loss

        return Net(), {"in a variable": in_a_variable, "around it": around_it}[where]

    stays_the_same(tmp_path, make)


class ByKey(dict):
    """Whose entries are attributes, too."""

    def __getattr__(self, name: str) -> object:
        return self[name]


class Configured(Net):
    settings = ByKey(scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.settings.scale * away.RNG.random())


def test_attributes_of_a_class_may_have_code_of_their_own(tmp_path: Path) -> None:
    stays_the_same(tmp_path, lambda: (Configured(), cross_entropy))


def test_a_tensor_that_is_made_of_the_first_batch(tmp_path: Path) -> None:
    stays_the_same(tmp_path, lambda: (Centered(), cross_entropy))


def test_losses_that_are_collected_on_the_way(tmp_path: Path) -> None:
    stays_the_same(tmp_path, lambda: (Collecting(), with_auxiliary))
    assert not away.LOSSES


def test_attributes_that_two_classes_have_are_not_taken_for_one_another() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.step_of_object = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step_of_object += 1
            return super().forward(x) * away.CONFIG.step_of_object

    before = kept([Counting()])
    away.CONFIG.step_of_object = 5
    before.put_back()
    assert away.CONFIG.step_of_object == 5
    away.reset()


@pytest.mark.parametrize("afterwards", [False, True])
def test_what_is_only_read_is_left_to_others(afterwards: bool) -> None:
    """Another thread, say, or the loop itself, which may have it in a graph."""
    global STEP
    STEP = 0
    QUEUE.clear()
    before = kept([Reading(), Keeping(in_a_table)], afterwards=afterwards)
    STEP, version = 5, BANK.add_(1)._version
    QUEUE.append(1)
    RING[:] = 3
    TABLE[0] = 7  # of too many entries, though it is changed
    before.put_back()
    assert (STEP, QUEUE, RING.tolist(), TABLE[0]) == (5, [1], [3, 3, 3], 7)
    assert version == BANK._version
    STEP = 0


def first_of_them(x: Tensor) -> Tensor:
    item = QUEUE[0]
    item[0] += 1
    return x / item[0]


@pytest.mark.parametrize("size", [2, 1020])
def test_a_container_whose_entries_alone_change_is_left_to_others(size: int) -> None:
    """To an actor, say, that appends to a replay buffer."""
    QUEUE[:] = [[0.0] for _ in range(size)]
    before = kept([Keeping(first_of_them)], cross_entropy)
    first_of_them(torch.ones(1))
    QUEUE.append([0.0])
    before.put_back()
    assert len(QUEUE) == size + 1
    assert QUEUE[0] == ([0.0] if size == 2 else [1.0])
    QUEUE.clear()


def test_tools_that_know_one_another_are_searched_once() -> None:
    from transforms import Transform  # type: ignore[import-not-found]

    tools = [Transform() for _ in range(60)]
    for tool in tools:
        tool.transforms += tools
    assert len(drawing(tools[0])) == 60


def test_the_names_in_a_functions_code() -> None:
    def outer(x: Tensor) -> list:
        return [F.relu(away.CONFIG.rng) for _ in x.values] + [(lambda: STEP)()]

    names = names_in(outer.__code__)
    assert set(names.variables) == {"F", "away", "STEP"}
    assert set(names.attributes) == {"relu", "CONFIG", "rng", "values"}
    (own, others) = variables_of(outer)
    assert own[0] is globals()
    assert set(own[1]) == {"F", "away", "STEP"}
    assert others[0] is vars(away)
    assert others[1] == ["CONFIG"]
