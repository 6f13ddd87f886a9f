"""What everyday loops do beside training: they save, copy, load, freeze, draw numbers, and keep state in odd places."""

import copy
import io
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from by_hand import ByHand, is_of_its_steps
from networks import plain_step, prefetched, prune_row, recorded, smooth_network, step_along, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, open_run
from dynamics.probing.batch import copied, sample_count, to_device
from dynamics.probing.moment import Moment
from dynamics.probing.objective import cross_entropy_objective
from dynamics.pruning import Pruner, removal_curve, resampled_scores


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class MovingKey(nn.Module):
    """A key encoder that each forward pass moves in place, as momentum contrast does."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                key.mul_(0.9).add_(query, alpha=0.1)
        return self.query(x) - self.key(x)


class RunningMean:
    """A plain object with state, as reinforcement learning normalises observations."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(4), 0

    def update(self, x: Tensor) -> None:
        self.count += len(x)
        self.mean = self.mean + (x.mean(0) - self.mean) * len(x) / self.count


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.running, self.array, self.layer = RunningMean(), np.zeros(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.running.update(x)
        self.array *= 0.9
        self.array += 0.1 * x.mean(0).numpy()
        return self.layer(x - self.running.mean - torch.from_numpy(self.array.copy()))


@pytest.mark.parametrize("build", [MovingKey, Normalised])
def test_state_that_a_forward_pass_changes_is_left_alone(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    def trained(record: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=1) if record else None
        for inputs, labels in vectors(3):
            if recorder:
                recorder.observe((inputs, labels))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        if recorder:
            recorder.close()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(trained(True), trained(False), strict=True))


class MovedKey(MovingKey):
    """The same, as it is published: new tensors in place of the old."""

    def forward(self, x: Tensor) -> Tensor:
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1
        return self.query(x) - self.key(x)


class CopiedKey(MovingKey):
    """As momentum contrast begins: the first forward pass moves the key to where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.key.load_state_dict({name: torch.ones_like(one) for name, one in self.query.state_dict().items()})
        self.query.load_state_dict(self.key.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
                key.lerp_(query, 0.5)
        return self.query(x) * (1 + self.key(x).detach())


class Codebook(nn.Module):
    """A frozen table that follows what the layer puts out, in each of the ways in which that is written."""

    def __init__(self, how: str, size: int = 3) -> None:
        super().__init__()
        self.query, self.how, self.passes = nn.Linear(4, 3), how, 0
        self.key = nn.ParameterDict({"table": nn.Parameter(torch.zeros(size), requires_grad=False)})

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        table, put_out = self.key["table"], self.query(x)
        logits = put_out * (1 + table[:3])
        new = table.detach() * 0.9 + 0.1 * put_out.detach().mean()
        if self.how == "data.copy_":
            table.data.copy_(new)
        elif self.how == "new":
            self.key["table"] = nn.Parameter(new, requires_grad=False)
        elif self.how == "every second" and self.passes % 2 == 0:
            table.data = new
        return logits


MOVING = {
    "in place": MovingKey,
    "new data": MovedKey,
    "a copy at first": CopiedKey,
    **{how: partial(Codebook, how) for how in ("data.copy_", "new", "every second")},
    **{f"large, {how}": partial(Codebook, how, 30) for how in ("data.copy_", "new", "every second")},
}


@pytest.mark.parametrize("name", MOVING)
def test_what_a_forward_pass_moves_is_measured_as_the_step_had_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, before, after = MOVING[name](), [], []
    optimizer = torch.optim.SGD(model.query.parameters(), 0.1)
    lost = "large" in name or "second" in name  # the first step that moves it; once that is known it is kept
    with (
        pytest.warns(match="not trained change within a step") if lost else nullcontext(),
        Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder,
    ):
        for inputs, labels in recorder.watch(vectors(6)):
            as_it_was = copy.deepcopy(model.key.state_dict())
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            before.append(loss.item())
            again = copy.deepcopy(model)
            again.key.load_state_dict(as_it_was)
            after.append(F.cross_entropy(again(inputs), labels).item())
    run = open_run(tmp_path / "run")
    measured = run["curvature"].step.values
    assert len(measured) == (6 - 1 if lost else 6)
    np.testing.assert_allclose(run["curvature"].loss_before, np.array(before)[measured], rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_after, np.array(after)[measured], rtol=1e-12)
    found, expected = run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm.sel(step=measured)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


class TrainingStep(MovedKey):
    """Moves the key in what the loop calls, before the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) - self.key(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1
        return F.cross_entropy(self(batch[0]), batch[1])


def test_what_the_objective_moves_before_the_forward_pass(tmp_path: Path) -> None:
    model, losses = TrainingStep(), []
    optimizer = torch.optim.SGD(model.query.parameters(), 0.1)
    objective = TrainingStep.training_step
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(5)):
            optimizer.zero_grad()
            loss = model.training_step(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("normed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_an_attribute_that_is_a_parameters_memory_is_the_optimizers(tmp_path: Path, normed: Callable) -> None:
    found, losses = [], []
    for record in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), normed(nn.Linear(5, 3)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) if record else nullcontext() as recorder:
            for inputs, labels in recorder.watch(vectors(4)) if record else vectors(4):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        found.append(list(model.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses[:4], rtol=1e-12)


@pytest.mark.parametrize("in_turns", [True, False])
def test_another_network_that_steps_meanwhile(tmp_path: Path, in_turns: bool) -> None:
    """A GAN's discriminator steps before the generator's loss is computed, or between its gradient and its step."""
    generator = small()
    discriminator = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))
    optimizers = [torch.optim.SGD(one.parameters(), 0.3) for one in (discriminator, generator)]
    losses, norms = [], []

    def fool(generator: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.softplus(-discriminator(generator(batch[0]))).mean()

    def tell_apart(batch: tuple[Tensor, Tensor]) -> None:
        optimizers[0].zero_grad()
        made, real = discriminator(generator(batch[0]).detach()), discriminator(batch[0][:, :3])
        (F.softplus(made) + F.softplus(-real)).mean().backward()

    with Recorder(tmp_path / "run", generator, optimizers[1], objective=fool, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(5)):
            if in_turns:
                tell_apart(batch)
                optimizers[0].step()
            optimizers[1].zero_grad()
            loss = fool(generator, batch)
            loss.backward()
            norms.append(sum(float(one.grad.square().sum()) for one in generator.parameters()))
            if not in_turns:
                tell_apart(batch)
                optimizers[0].step()
            optimizers[1].step()
            losses.append(loss.item())
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(curvature.loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm.sum("layer"), norms, rtol=1e-10)


def test_frozen_parameters_that_stay_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    take = Moment.__init__
    monkeypatch.setattr(
        Moment, "__init__", lambda self, *given, **how: (take(self, *given, **how), kept.append(len(self.frozen)))[0]
    )
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 9), nn.Linear(9, 3))
    optimizer = torch.optim.SGD(model[1:].parameters(), 0.1)
    recorded(tmp_path / "run", model, optimizer, vectors(4), curvature_every=1)
    assert max(kept) == 2
    assert not any(kept[3:])  # the first step has told
    kept.clear()
    large = nn.Sequential(nn.Linear(4, 40).requires_grad_(False), nn.Linear(40, 3))
    recorded(tmp_path / "large", large, torch.optim.SGD(large[1].parameters(), 0.1), vectors(4), curvature_every=1)
    assert not any(kept)


class OnAGraph(nn.Module):
    """A frozen sparse matrix between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(5).to_sparse(), requires_grad=False)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sparse.mm(self.mix, torch.tanh(self.first(x)).T).T)


@pytest.mark.parametrize("capture", [True, False])
def test_a_frozen_sparse_parameter(tmp_path: Path, capture: bool) -> None:
    model, dense = OnAGraph(), OnAGraph()
    dense.load_state_dict(model.state_dict())
    dense.mix = nn.Parameter(torch.eye(5), requires_grad=False)
    found = []
    for name, one in (("sparse", model), ("dense", dense)):
        optimizer = torch.optim.SGD([*one.first.parameters(), *one.last.parameters()], 0.1)
        found.append(recorded(tmp_path / name, one, optimizer, vectors(3), curvature_every=1, capture=capture))
    assert found[0]["curvature"].sizes["step"] == 3
    for quantity in ("loss_before", "loss_after", "grad_hess_grad"):
        np.testing.assert_allclose(found[0]["curvature"][quantity], found[1]["curvature"][quantity], rtol=1e-10)


class Centred(nn.Module):
    """A loss that centres the teacher's outputs on their running mean, as self-distillation does."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3)) if buffer else setattr(self, "centre", torch.zeros(3))
        self.count = 0

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss = -(F.softmax((teacher - self.centre) * 3, -1) * F.log_softmax(student, -1)).sum(-1).mean()
        self.centre = self.centre * 0.5 + teacher.mean(0) * 0.5
        self.count += 1
        return loss / self.count


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("gradients", ["arrive", "are put there"])
def test_the_state_of_the_loss_and_of_a_teacher_is_that_of_the_step(
    tmp_path: Path, buffer: bool, micro_batches: int, gradients: str
) -> None:
    model, teacher, loss_of = small(), nn.Sequential(nn.BatchNorm1d(4), small()), Centred(buffer)
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses: list[float] = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0])
        return loss_of(model(batch[0]), target)

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(6))):
            loss = objective(model, batch) / micro_batches
            if gradients == "arrive":
                loss.backward()
            else:
                for one, grad in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
                    one.grad = grad if one.grad is None else one.grad + grad
            losses.append(loss.item())
            if (number + 1) % micro_batches == 0:
                optimizer.step()
                optimizer.zero_grad()
                assert loss_of.count == number + 1
                with torch.no_grad():
                    for ours, theirs in zip(model.parameters(), teacher[1].parameters(), strict=True):
                        theirs.lerp_(ours, 0.1)
    run = open_run(tmp_path / "run")
    expected = np.reshape(losses, (-1, micro_batches)).sum(1)
    np.testing.assert_allclose(run["curvature"].loss_before, expected, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-10)


class Unfolding(nn.Module):
    """Has a part and a buffer only from its first forward pass on."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "part"):
            self.part = nn.Tanh()
            self.register_buffer("scale", torch.ones(4))
        return self.part(inputs) * self.scale


def test_a_forward_pass_of_an_event_adds_nothing_to_the_network(tmp_path: Path) -> None:
    model = nn.Sequential(Unfolding(), nn.Linear(4, 3))
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=vectors(1)):
            prune_row(model, "1.weight", 0)
    assert len(list(model[0].modules())) == 1
    assert not model[0].state_dict()


def test_what_the_objective_does_not_run_is_looked_at_once(tmp_path: Path) -> None:
    model, another = small(), nn.BatchNorm1d(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hooks = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with (
        pytest.warns(UserWarning, match="at no measured step was a loss logged"),
        Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder,
    ):
        for inputs, labels in recorder.watch(vectors(3)):
            hooks.append(len(torch.nn.modules.module._global_forward_pre_hooks))
            optimizer.zero_grad()
            F.cross_entropy(model(another(inputs)), labels).backward()
            optimizer.step()
    assert hooks == [1, 0, 0]
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_model_is_saved_and_copied_while_it_is_recorded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.2), nn.Linear(9, 3))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(3)):
            best = copy.deepcopy(model)
            F.cross_entropy(best(inputs), labels).backward()  # draws a mask, and is not the model's forward pass
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            torch.save(model, io.BytesIO())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
    saved = io.BytesIO()
    torch.save(best, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False).eval()
    assert torch.equal(again(inputs), best.eval()(inputs))


def test_an_optimizer_whose_state_is_loaded_midway(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.2}], 0.1, weight_decay=0.5
    )
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(vectors(4))):
            if number == 1:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.param_groups[0].update(lr=0.01, weight_decay=0.0)
            if number == 3:
                first, second = optimizer.param_groups
                first["params"], second["params"] = second["params"], first["params"]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_allclose(steps.learning_rate, [[0.1, 0.2], [0.01, 0.2], [0.01, 0.2], [0.2, 0.01]])
    np.testing.assert_allclose(
        steps.decay_sqnorm / steps.param_sqnorm, [[0.5, 0.5], [0, 0.5], [0, 0.5], [0.5, 0]], atol=1e-12
    )


@pytest.mark.parametrize("rate", ["none", "absent"])
def test_an_optimizer_without_a_learning_rate(tmp_path: Path, rate: str) -> None:
    class Optimizer(torch.optim.Optimizer):
        def __init__(self, parameters: object) -> None:
            super().__init__(parameters, {"lr": None} if rate == "none" else {})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(0.1 * parameter.grad)

    model = small()
    optimizer = Optimizer(model.parameters())
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(vectors(2)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.learning_rate.isnull().all()
    np.testing.assert_allclose(steps.update_sqnorm, 0.01 * steps.grad_sqnorm, rtol=1e-12)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_loss_that_draws_before_the_network_runs(tmp_path: Path, noisy: bool) -> None:
    """Denoising diffusion; and with noise that the loop itself adds once the batch is there."""
    network = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    optimizer, losses = torch.optim.SGD(network.parameters(), 0.1), []

    def denoising(model: nn.Module, x: Tensor) -> Tensor:
        time, noise = (0.5, x) if noisy else (torch.rand(len(x), 1), torch.randn_like(x))
        blurred = (1 - time) * x + time * noise
        return F.mse_loss(model(torch.cat([blurred, blurred[:, :1]], 1)), noise)

    with Recorder(tmp_path / "run", network, optimizer, objective=denoising, curvature_every=1) as recorder:
        for x in recorder.watch([inputs for inputs, _ in vectors(4)]):
            if noisy:
                torch.randn(3)
            losses.append(step_along(denoising(network, x), optimizer))
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_loss_with_parameters_of_its_own(tmp_path: Path) -> None:
    """Learned weights of several tasks: the step moves them, too."""
    model, weights = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
    optimizer, losses = torch.optim.Adam([*model.parameters(), weights], 0.1), []

    def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]).square().mean(0) * torch.exp(-weights) + weights).sum()

    with Recorder(tmp_path / "run", model, optimizer, objective=weighted, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            loss = weighted(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [(loss.item(), weighted(model, batch).item())]
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(np.stack([curvature.loss_before, curvature.loss_after], 1), losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm, curvature.applied_grad_sqnorm, rtol=1e-12)


class Margin(nn.Module):
    """The loss of metric learning: cosines with learned centres of the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(4 * F.normalize(points) @ F.normalize(self.centres).T, labels)


@pytest.mark.parametrize("several", [False, True])
def test_a_loss_that_is_a_module_with_parameters_of_its_own(tmp_path: Path, several: bool) -> None:
    """The step moves them, too: the loss after the step is that of both."""
    model, margin, losses = nn.Linear(4, 3), Margin(), []
    parts = [list(model.parameters()), list(margin.parameters())]
    optimizers = [torch.optim.SGD(part, 0.5) for part in (parts if several else [[*parts[0], *parts[1]]])]

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return margin(model(batch[0]), batch[1])

    with Recorder(tmp_path / "run", model, optimizers, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            loss = objective(model, batch)
            for one in optimizers:
                one.zero_grad()
            loss.backward()
            for one in optimizers:
                one.step()
            losses += [(loss.item(), objective(model, batch).item())]
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(np.stack([curvature.loss_before, curvature.loss_after], 1), losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm, curvature.applied_grad_sqnorm, rtol=1e-12)


def test_tensors_that_are_made_elsewhere_by_default(tmp_path: Path) -> None:
    """A default device that the network is not on: only the loop's own tensors are made there."""
    records = []
    for elsewhere in (False, True):
        model, batches = small(), vectors(4)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        with torch.device("meta") if elsewhere else nullcontext():
            pruner = Pruner(model, optimizer, "loss_preservation", protected=["2"])
            with Recorder(tmp_path / f"{elsewhere}", model, optimizer, curvature_every=2) as recorder:
                for batch in recorder.watch(batches):
                    recorder.log(loss=plain_step(model, optimizer, batch))
                pruning = pruner.plan(0.4, batches)
                with recorder.event("prune", probe=batches, **pruning.attributes) as event:
                    pruner.apply(pruning)
                    event.units(alive=pruning.alive, scores=pruning.scores)
                    event.add("curve", removal_curve(model, batches, pruning.scores, [0.2], protected=["2"]))
                    event.add("scores", resampled_scores(model, batches, ["random"], draws=2, protected=["2"]))
        records.append(open_run(tmp_path / f"{elsewhere}"))
    for name, node in records[0].children.items():
        xr.testing.assert_equal(node.to_dataset(), records[1][name].to_dataset())
    assert records[0]["curvature"].sizes["step"] == 2


class Readout(nn.Linear):
    """The last layer in maximal update parametrization, which keeps the width that it divides by on its weight.

    It also counts its forward passes there, and trains a little less in each.
    """

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight.width, self.weight.passes = self.in_features / 2, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.weight.passes[0] += 1
        return F.linear(x / self.weight.width / self.weight.passes[0], self.weight, self.bias)


def test_what_is_noted_on_a_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, losses = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Readout(5, 3)), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            losses.append(plain_step(model, optimizer, batch).item())
    assert model[2].weight.passes == [4]
    is_of_its_steps(tmp_path / "run", losses)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("when", ["before the backward pass", "before the step", "after the step"])
def test_losses_stay_with_their_steps_when_the_first_layer_is_frozen(tmp_path: Path, watched: bool, when: str) -> None:
    model, losses = small(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(vectors(6)) if watched else vectors(6)):
            optimizer.zero_grad()
            if number == 2:
                model[0].requires_grad_(False)
            loss = F.cross_entropy(model(inputs), labels)
            if when == "before the backward pass":
                recorder.log(loss=loss)
            loss.backward()
            if when == "before the step":
                recorder.log(loss=loss)
            optimizer.step()
            if when == "after the step":
                recorder.log(loss=loss)
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, losses, rtol=1e-6)


def test_a_watched_loader_is_asked_what_the_loader_knows(tmp_path: Path) -> None:
    model = small()
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        loader = DataLoader(TensorDataset(torch.zeros(6, 4)), batch_size=2)
        watched = recorder.watch(loader)
        assert (watched.batch_size, watched.dataset, len(watched)) == (2, loader.dataset, 3)
        with pytest.raises(AttributeError, match="nothing"):
            watched.nothing  # noqa: B018


class Encoding(UserDict):
    def __getattr__(self, name: str) -> Tensor:
        return self.data[name]


def test_a_batch_keeps_its_kind_and_counts_its_samples() -> None:
    tokens = Encoding({"input_ids": torch.zeros(2, 3)})
    other = copied(tokens)
    other.input_ids.fill_(1)
    assert isinstance(other, Encoding)
    assert not tokens.input_ids.any()
    pictures = [torch.zeros(3, 8, 8) for _ in range(5)]
    assert sample_count((pictures, [{} for _ in pictures])) == 5
    assert sample_count([torch.zeros(4, 2), torch.zeros(4)]) == 4


class Sample(MutableMapping):
    """Keeps its parts in a dictionary, which a copy of it shares."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def __setitem__(self, name: str, part: Tensor) -> None:
        self.parts[name] = part

    def __delitem__(self, name: str) -> None:
        del self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def test_a_copy_of_a_batch_leaves_it_as_it_is() -> None:
    x = torch.ones(2)
    sample = Sample({"x": x})
    assert copied(sample)["x"] is not x
    assert sample["x"] is x


@dataclass
class Graphs:
    nodes: Tensor
    labels: Tensor
    on: str = "cpu"

    def to(self, device: torch.device) -> "Graphs":
        return replace(self, on=str(device))


@pytest.mark.parametrize("kind", ["tensors", "arrays", "an object"])
def test_a_batch_that_the_loop_changes_in_place(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: object) -> Tensor:
        x, y = (batch.nodes, batch.labels) if kind == "an object" else map(torch.as_tensor, batch)
        return F.cross_entropy(model(x), y)

    batches = [(x.clone(), y) for x, y in vectors(3)]
    if kind != "tensors":
        batches = [(x.numpy(), y.numpy()) if kind == "arrays" else Graphs(x, y) for x, y in batches]
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            (batch.nodes if kind == "an object" else batch[0])[:] = 0
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("by", ["the loop", "the objective", "what reads ahead"])
def test_a_batch_that_is_changed_in_place_before_its_forward_pass(tmp_path: Path, by: str) -> None:
    """Normalised, or mixed by CutMix, where it lies."""
    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def normalised(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        batch[0].sub_(5).div_(2)
        return batch

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = normalised(batch) if by == "the objective" else batch
        return F.cross_entropy(model(x), y)

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        batches = recorder.watch([(x + 5, y) for x, y in vectors(4)])
        for batch in prefetched(map(normalised, batches)) if by == "what reads ahead" else batches:
            losses.append(step_along(objective(model, normalised(batch) if by == "the loop" else batch), optimizer))
    is_of_its_steps(tmp_path / "run", losses)


def test_a_batch_that_is_changed_in_place_after_a_pass_in_eval_mode(tmp_path: Path) -> None:
    """Adversarial training: along the gradient of a pass that is none of the step's."""
    torch.manual_seed(0)
    model, losses = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2)), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for x, y in recorder.watch(vectors(4)):
            point = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model.eval()(point), y), point)
            x.add_(slope.sign(), alpha=0.3)
            losses.append(step_along(F.cross_entropy(model.train()(x), y), optimizer))
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("kind", ["a list", "a dictionary", "a tokenizer's", "an object", "arrays"])
def test_a_batch_in_which_the_loop_puts_others_before_its_forward_pass(tmp_path: Path, kind: str) -> None:
    """``batch[0] = augmented(batch[0])``, and the labels are taken out, as they are no argument of the model."""
    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def make(x: Tensor, y: Tensor) -> object:
        parts = {"nodes": x, "labels": y}
        made = {"a list": [x, y], "an object": Graphs(x, y), "arrays": [x.numpy().copy(), y.numpy()]}
        return made.get(kind) or (UserDict(parts) if kind == "a tokenizer's" else parts)

    def parts(batch: object) -> tuple[Tensor, Tensor]:
        found = (batch.nodes, batch.labels) if kind == "an object" else batch
        found = (found["nodes"], found["labels"]) if isinstance(found, MutableMapping) else found
        return tuple(map(torch.as_tensor, found))

    def objective(model: nn.Module, batch: object) -> Tensor:
        x, y = parts(batch)
        return F.cross_entropy(model(x), y)

    def augment(batch: object) -> None:
        x = parts(batch)[0].flip(0) * 2
        if kind == "an object":
            batch.nodes = x
        elif kind == "arrays":
            batch[0][:] = x.numpy()
        else:
            batch[0 if kind == "a list" else "nodes"] = x

    batches = [make(x, y) for x, y in vectors(4)]
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            augment(batch)
            x, y = parts(batch)
            if isinstance(batch, MutableMapping):
                del batch["labels"]
            losses.append(step_along(F.cross_entropy(model(x), y), optimizer))
    is_of_its_steps(tmp_path / "run", losses)


def test_a_batch_in_which_the_loop_puts_what_batchnorm_hardly_tells_from_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, losses = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch([[10 * x, y] for x, y in vectors(4)]):
            batch[0] = batch[0] * 2
            losses.append(plain_step(model, optimizer, batch).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_batch_that_lacks_what_the_loss_needs_until_the_loop_puts_it_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, losses, noise = nn.Linear(4, 3), [], torch.zeros(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"] + batch["noise"]), batch["y"])

    batches = [{"x": x, "y": y} for x, y in vectors(4)]
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            batch["noise"] = noise
            losses.append(step_along(objective(model, batch), optimizer))
            noise = noise / 2 + batch["x"].abs()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_what_a_device_is_sent() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)], enforce_sorted=False)
    sent = to_device({"packed": packed, "graphs": Graphs(torch.ones(2), torch.ones(2))}, torch.device("meta"))
    assert (sent["packed"].data.device.type, sent["packed"].batch_sizes.device.type) == ("meta", "cpu")
    assert sent["graphs"].on == "meta"


class Named(list):
    """Cannot be made of its parts."""

    def __init__(self, name: str, *parts: object) -> None:
        super().__init__(parts)
        self.name = name


class Fixed(UserDict):
    def update(self, *given: object, **named: object) -> None:
        raise TypeError("it is fixed")


class Trap:
    def __getattr__(self, name: str) -> object:
        raise KeyError(name)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("kind", ["named", "fixed", "cyclic", "trap"])
def test_a_batch_that_cannot_be_kept_costs_the_curvature_at_most(tmp_path: Path, kind: str, watched: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []

    def batch_of(x: Tensor, y: Tensor) -> object:
        fixed: object = [x, y]
        if kind == "named":
            fixed = Named("batch", x, y)
        elif kind == "fixed":
            fixed = Fixed()
            fixed.data = {0: x, 1: y}
        else:
            fixed.append(fixed if kind == "cyclic" else Trap())
        return fixed

    batches = [batch_of(x, y) for x, y in vectors(3)]
    warned = nullcontext() if kind == "trap" else pytest.warns(UserWarning, match="curvature is not recorded from")
    with (
        warned,
        Recorder(
            tmp_path / "run",
            model,
            optimizer,
            objective=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            curvature_every=1,
        ) as recorder,
    ):
        for batch in recorder.watch(batches) if watched else batches:
            if not watched:
                recorder.observe(batch)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    assert kind != "trap" or run["curvature"].loss_before.values == pytest.approx(losses)


@pytest.mark.parametrize(
    ("outputs", "message"), [(1, "the cross-entropy of one class is always 0"), (5, "labels hold negative numbers")]
)
def test_a_regression_whose_objective_was_forgotten_is_said(tmp_path: Path, outputs: int, message: str) -> None:
    model = nn.Linear(4, outputs)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.randn(8, 4), torch.randn(8, outputs)) for _ in range(3)]
    with pytest.warns(UserWarning, match=f"curvature is not recorded from step 0 on.*{message}.*objective=lambda"):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
            for inputs, targets in recorder.watch(batches):
                optimizer.zero_grad()
                F.mse_loss(model(inputs), targets).backward()
                optimizer.step()
    run = open_run(tmp_path / "run")
    assert run["steps"].sizes["step"] == 3
    assert not run["curvature"].data_vars


def test_labels_are_probabilities_of_which_some_are_zero() -> None:
    model, ((inputs, labels),) = nn.Linear(4, 3), vectors(1)
    found = cross_entropy_objective(model, (inputs, F.one_hot(labels, 3).double()))
    torch.testing.assert_close(found, F.cross_entropy(model(inputs), labels))


def test_an_objective_without_a_gradient_is_said(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"may be of another loss.*have cosine 0\.00.*or rounds to half"):
        with Recorder(
            tmp_path / "run", model, optimizer, objective=lambda model, batch: 0 * model(batch[0]).sum(),
            curvature_every=1,
        ) as recorder:  # fmt: skip
            for batch in recorder.watch(vectors(2)):
                plain_step(model, optimizer, batch)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("compiled", ["scripted", "traced"])
def test_a_scripted_model_has_no_curvature(tmp_path: Path, compiled: str) -> None:
    plain, ((inputs, _),) = smooth_network(), vectors(1)
    model = torch.jit.script(plain) if compiled == "scripted" else torch.jit.trace(plain, inputs)
    optimizer, by_hand = torch.optim.SGD(model.parameters(), 0.1), ByHand(model)
    with pytest.warns(UserWarning, match="curvature is not recorded from step 0 on.*a ScriptModule hides"):
        with Recorder(tmp_path / "run", model, optimizer) as recorder:
            for inputs, labels in recorder.watch(vectors(4)):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                by_hand.before()
                optimizer.step()
                by_hand.after()
    by_hand.agrees_with(open_run(tmp_path / "run")["steps"])
