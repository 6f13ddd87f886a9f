"""Parameters that a loss finds elsewhere than in the model's modules, that are put into others, or are no numbers."""

import operator
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from by_hand import curvature_by_hand
from networks import cross_entropy
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dynamics import Recorder, open_run
from dynamics.pruning import Pruner

Objective = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(4)]


def record(path: Path, model: nn.Module, objective: Objective = cross_entropy) -> tuple[xr.Dataset, list[dict]]:
    """Curvature as recorded, and by hand: by two backward passes through the loop's own graph."""
    optimizer, by_hand = torch.optim.SGD(model.parameters(), 0.1), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches()):
            loss = objective(model, batch)
            by_hand.append(curvature_by_hand(loss, trained))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return open_run(path)["curvature"].to_dataset(), by_hand


class Hyper(nn.Module):
    """A network whose weights another one makes, put into a skeleton outside."""

    def __init__(self, skeleton: nn.Module) -> None:
        super().__init__()
        self.code, self.makes = nn.Parameter(torch.randn(3)), nn.Linear(3, 4 * 3 + 3)
        self.run = lambda weights, x: functional_call(skeleton, weights, (x,))

    def forward(self, x: Tensor) -> Tensor:
        made = self.makes(self.code)
        return self.run({"weight": made[:12].view(3, 4), "bias": made[12:]}, x)


class Ensemble(nn.Module):
    """Several networks at once by torch.func.vmap."""

    def __init__(self) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(3)]
        stacked, _ = stack_module_state(members)
        self.names = list(stacked)
        self.stacked = nn.ParameterList([nn.Parameter(stacked[name].detach()) for name in self.names])
        self.one = [members[0].to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.stacked, strict=True))
        return vmap(lambda own: functional_call(self.one[0], own, (x,)))(weights).mean(0)


@pytest.mark.parametrize("make", [lambda: Hyper(nn.Linear(4, 3)), Ensemble], ids=["hypernetwork", "ensemble"])
def test_what_torch_func_puts_into_another_module_is_not_kept_there(tmp_path: Path, make: Callable) -> None:
    torch.manual_seed(0)
    model = make().double()
    found, by_hand = record(tmp_path / "run.zarr", model)
    for name in by_hand[0]:
        values = found[name].sum("layer") if "layer" in found[name].dims else found[name]
        np.testing.assert_allclose(values, [row[name] for row in by_hand], rtol=1e-10, err_msg=name)


class InAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)
        self.all = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.all[0]))


class Penalty:
    """Elastic weight consolidation, as it is often written: of parameters that it keeps."""

    def __init__(self, model: nn.Module) -> None:
        self.now = dict(model.named_parameters())
        self.old = {name: one.detach().clone() for name, one in self.now.items()}

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        far = sum((one - self.old[name]).square().sum() for name, one in self.now.items())
        return cross_entropy(model, batch) + 2 * far


@pytest.mark.parametrize("case", ["model", Penalty])
def test_a_loss_of_parameters_that_were_taken_out_of_the_model_is_refused(tmp_path: Path, case: str | type) -> None:
    torch.manual_seed(0)
    model = InAList().double() if case == "model" else nn.Linear(4, 3).double()
    if case == "model":
        model.all = [model.weight]
    objective = cross_entropy if case == "model" else case(model)
    with pytest.warns(UserWarning, match=r"the loss uses a parameter of the model, of shape .* taken out of it"):
        found, _ = record(tmp_path / "run.zarr", model, objective)
    assert not found
    assert open_run(tmp_path / "run.zarr")["steps"].sizes["step"] == 4


class Beside:
    """A network outside the model that has a weight of the model, as a decoder or a teacher that is tied to it."""

    def __init__(self, model: nn.Sequential, *, teaches: bool) -> None:
        self.network, self.teaches = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), teaches
        self.network[2].weight = model[2].weight

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.teaches):
            beside = self.network(batch[0])
        return cross_entropy(model, batch) + F.cross_entropy(model(batch[0]), beside.softmax(-1))


@pytest.mark.parametrize("teaches", [False, True])
def test_a_weight_that_another_network_shares_is_the_model_s(tmp_path: Path, teaches: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    objective, own = Beside(model, teaches=teaches), dict(model.named_parameters())
    optimizer, expected = torch.optim.SGD(model.parameters(), 0.5), []
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches()):
            loss = objective(model, batch)
            row = curvature_by_hand(loss, list(model.parameters()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(row | {"loss_before": loss.item(), "loss_after": objective(model, batch).item()})
    found = open_run(tmp_path / "run")["curvature"].to_dataset()
    for name in expected[0]:
        values = found[name].sum("layer") if "layer" in found[name].dims else found[name]
        np.testing.assert_allclose(values, [row[name] for row in expected], rtol=1e-10, err_msg=name)
    assert objective.network[2].weight is own["2.weight"]
    assert model[2].weight is own["2.weight"]


def test_whole_numbers_among_the_parameters_are_no_coordinates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    model.packed = nn.Parameter(torch.arange(5, dtype=torch.uint8), requires_grad=False)
    found, by_hand = record(tmp_path / "run.zarr", model)
    np.testing.assert_allclose(found.grad_hess_grad.sum("layer"), [row["grad_hess_grad"] for row in by_hand], 1e-10)


def test_points_at_which_a_loss_takes_derivatives_stay_such(tmp_path: Path) -> None:
    def residual(model: nn.Module, point: Tensor) -> Tensor:
        slope = torch.autograd.grad(model(point).sum(), point, create_graph=True)[0]
        return (slope - 1).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, objective=residual, curvature_every=1) as recorder:
        for _ in range(3):
            points = torch.rand(7, 1).double().requires_grad_()
            recorder.observe(points)
            optimizer.zero_grad()
            loss = residual(model, points)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            assert points.grad is not None
    np.testing.assert_allclose(open_run(tmp_path / "run.zarr")["curvature"].loss_before, losses, 1e-12)


class Shared(nn.Module):
    """The same module under several names, as the embedding of an encoder and a decoder is."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.encoder = nn.ModuleList([self.shared, self.norm, self.shared])
        self.decoder = nn.ModuleDict({"shared": self.shared, "norm": self.norm})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.encoder:
            x = torch.tanh(part(x))
        return self.out(self.decoder["norm"](self.decoder["shared"](x)))


def test_a_module_that_a_model_holds_several_times_stays_its_own(tmp_path: Path) -> None:
    def trained(recorder: Callable[..., Recorder] | None) -> tuple[nn.Module, list[Tensor]]:
        torch.manual_seed(0)
        model = Shared().double()
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
        attached = recorder and recorder(model, optimizer)
        for x, y in attached.watch(batches()) if attached else batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            seen += [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            if attached and len(seen) < 8:
                with attached.event("nothing", probe=[(x, y)]):
                    pass
        if attached:
            attached.close()
        return model, [*seen, *model.state_dict().values()]

    _, plain = trained(None)
    model, recorded = trained(lambda *pair: Recorder(tmp_path / "run.zarr", *pair, curvature_every=1))
    assert all(map(torch.equal, plain, recorded))
    assert model.shared is model.encoder[0]
    assert all(isinstance(one, nn.Parameter) for module in model.modules() for one in module._parameters.values())


class Tree(nn.Module):
    """Parameters that are named by where they are in a tree, which is no module, as in TensorDict's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters["layer.weight"] = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._parameters["layer.weight"])


@pytest.mark.parametrize("make", [Shared, Tree])
def test_its_curvature_is_right(tmp_path: Path, make: Callable) -> None:
    torch.manual_seed(0)
    found, by_hand = record(tmp_path / "run.zarr", make().double())
    for name in by_hand[0]:
        values = found[name].sum("layer") if "layer" in found[name].dims else found[name]
        np.testing.assert_allclose(values, [row[name] for row in by_hand], rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("measure", ["magnitude", "synflow"])
def test_a_network_that_holds_a_module_twice_is_pruned_and_stays_itself(measure: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model.twin = nn.Identity()
    model.twin.of = model[2]
    parameters = list(model.parameters())
    Pruner(model, torch.optim.SGD(parameters, 0.1), measure).prune(0.25, [(torch.randn(8, 4), torch.arange(8) % 3)])
    assert all(map(operator.is_, model.parameters(), parameters))
    assert model[2].weight is parameters[2]


@pytest.mark.parametrize("given", ["both", "the one that steps last", "the one that steps first"])
def test_an_optimizer_that_was_not_given_is_said_where_it_steps_in_between(tmp_path: Path, given: str) -> None:
    """What the other one holds is then not where the gradient is from."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    first, last = (torch.optim.SGD(model[place].parameters(), 0.3) for place in (0, 2))
    optimizers = {"both": [first, last], "the one that steps last": last, "the one that steps first": first}[given]
    losses = []
    said = pytest.warns(match="first '0.weight', .*Pass all optimizers that train the model, as a list")
    with said if given.endswith("last") else nullcontext():
        with Recorder(tmp_path / "run", model, optimizers, curvature_every=1) as recorder:
            for inputs, labels in recorder.watch(batches()):
                model.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                first.step()
                last.step()
                losses.append(loss.item())
    curvature = open_run(tmp_path / "run")["curvature"]
    same = np.isclose(curvature.loss_before, losses, rtol=1e-12)
    assert same.all() != given.endswith("last")


@pytest.mark.parametrize("given", ["both", "the one that steps last", "the one that steps first"])
@pytest.mark.parametrize("weighs", [True, False])
def test_so_is_one_that_steps_in_between_and_holds_a_tensor_outside_the_model(
    tmp_path: Path, given: str, weighs: bool
) -> None:
    """Weights of points that ascend, as a self-adaptive physics-informed network has them, if the loss uses them."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    weights = torch.rand(8, 3, dtype=torch.float64, requires_grad=True)
    first, last = torch.optim.Adam([weights], 0.1, maximize=True), torch.optim.SGD(model.parameters(), 0.1)
    optimizers, losses = {"both": [first, last]}.get(given, last), []
    steps = (last, first) if given.endswith("first") else (first, last)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (weights ** (2 if weighs else 0) * model(batch[0]).square()).mean()

    is_lost = weighs and given.endswith("last")
    said = pytest.warns(match=r"a tensor of shape \(8, 3\) that the objective .*Pass all optimizers that step")
    with said if is_lost else nullcontext():
        with Recorder(tmp_path / "run", model, optimizers, objective=objective, curvature_every=1) as recorder:
            for batch in recorder.watch(batches()):
                model.zero_grad()
                weights.grad = None
                loss = objective(model, batch)
                loss.backward()
                for one in steps:
                    one.step()
                losses.append(loss.item())
    same = np.isclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
    assert same.all() != is_lost


def test_nor_is_one_of_another_loss(tmp_path: Path) -> None:
    """Two networks in one model, each with its loss and its recorder: what the other does is none of its business."""
    model = nn.ModuleDict({"actor": nn.Linear(4, 3), "critic": nn.Linear(4, 3)}).double()
    actor, critic = (torch.optim.SGD(model[name].parameters(), 0.3) for name in model)
    with Recorder(tmp_path / "run", model, critic, objective=loss_of("critic"), curvature_every=1) as recorder:
        for batch in recorder.watch(batches()):
            model.zero_grad()
            (loss_of("actor")(model, batch) + loss_of("critic")(model, batch)).backward()
            actor.step()
            critic.step()
    assert open_run(tmp_path / "run")["curvature"].loss_before.notnull().all()


def loss_of(name: str) -> Objective:
    return lambda model, batch: cross_entropy(model[name], batch)


def test_nor_is_one_that_has_stepped_when_the_pass_of_the_step_begins(tmp_path: Path) -> None:
    """A critic that is trained on the batch first: the actor's loss is of where it is by then."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    actor, critic = (torch.optim.SGD(model[place].parameters(), 0.3) for place in (0, 2))
    losses: list[float] = []

    def actors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -model(batch[0]).mean()

    with Recorder(tmp_path / "run", model, actor, objective=actors, curvature_every=1) as recorder:
        for batch in recorder.watch(batches()):
            model.zero_grad()
            (model(batch[0])[:, 0] - batch[1]).square().mean().backward()
            critic.step()
            model.zero_grad()
            loss = actors(model, batch)
            loss.backward()
            actor.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
