"""Loops that caught a careless recorder: shared state, odd closures, batches that come to nothing, changing models."""

import copy
import gc
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, is_of_its_steps
from networks import (
    convolutional_network,
    cross_entropy,
    dense,
    flat,
    images,
    plain_step,
    recorded,
    smooth_network,
    step_along,
    vectors,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune

from dynamics import Recorder, open_run
from dynamics.network.structure import Structure
from dynamics.probing.probe import Probe
from dynamics.pruning import Pruner


class Stateful(nn.Module):
    """Its output depends on what it keeps, and each forward pass changes that in place."""

    def __init__(self, kind: str, shared: dict[str, float]) -> None:
        super().__init__()
        self.layer, self.kind, self.shared = nn.Linear(4, 3), kind, shared
        self.kept = {
            "tensor": torch.ones(3), "deque": deque([1.0], maxlen=3), "nested": {"inner": [1.0]},
            "generator": torch.Generator().manual_seed(1), "numpy": np.random.default_rng(1), "shared": None,
        }[kind]  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs) * self.shared["scale"]
        if self.kind == "tensor":
            return outputs + self.kept.mul_(0.9)
        if self.kind == "deque":
            self.kept.append(sum(self.kept) / 2)
            return outputs + sum(self.kept)
        if self.kind == "nested":
            self.kept["inner"][0] *= 0.9
            return outputs * self.kept["inner"][0]
        if self.kind == "generator":
            return outputs * torch.rand(3, generator=self.kept)
        return outputs * self.kept.random() if self.kind == "numpy" else outputs


@pytest.mark.parametrize("kind", ["tensor", "deque", "nested", "generator", "numpy", "shared"])
def test_what_a_model_keeps_and_shares_is_left_alone(tmp_path: Path, kind: str) -> None:
    weights = []
    for path in (None, tmp_path / "run"):
        torch.manual_seed(0)
        shared = {"scale": 1.0}
        model = Stateful(kind, shared)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        recorder = Recorder(path, model, optimizer, curvature_every=1) if path else None
        losses = []
        for batch in recorder.watch(vectors(4)) if recorder else vectors(4):
            losses.append(plain_step(model, optimizer, batch).item())
            shared["scale"] *= 0.8  # the loop anneals what the model reads
        if recorder:
            recorder.close()
        weights.append(flat(list(model.parameters())))
    assert torch.equal(*weights)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_another_network_in_the_objective_is_left_alone(tmp_path: Path) -> None:
    teacher, model = convolutional_network(), convolutional_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def distill(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), teacher(batch[0]))

    with Recorder(tmp_path / "run", model, optimizer, objective=distill, curvature_every=1) as recorder:
        for batch in recorder.watch(images(3)):
            optimizer.zero_grad()
            distill(model, batch).backward()
            before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
            optimizer.step()
            assert all(torch.equal(before[name], buffer) for name, buffer in teacher.named_buffers())
    assert open_run(tmp_path / "run")["curvature"].sizes["step"] == 3


@pytest.mark.parametrize("batches", ["watched", "observed", "unknown"])
@pytest.mark.parametrize("first", ["the loop's hooks", "the recorder"])
def test_an_optimizer_in_the_backward_pass(tmp_path: Path, first: str, batches: str) -> None:
    """One for each parameter, which steps as soon as its gradient is there."""
    model, losses = smooth_network(), []
    optimizers = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    def hook() -> None:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)

    if first == "the loop's hooks":
        hook()
    with Recorder(tmp_path / "run", model, list(optimizers.values()), curvature_every=0) as recorder:
        if first == "the recorder":
            hook()
        for _ in range(2):
            for batch in recorder.watch(vectors(3)) if batches == "watched" else vectors(3):
                if batches == "observed":
                    recorder.observe(batch)
                loss = cross_entropy(model, batch)
                loss.backward()
                recorder.log(loss=loss)
                losses.append(loss.item())
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.sizes["step"] == 6
    np.testing.assert_allclose(steps.update_sqnorm, 0.01 * steps.grad_sqnorm, rtol=1e-10)
    np.testing.assert_array_equal(steps.loss, losses)


@pytest.mark.parametrize("blocks", ["as many", "fewer"])
def test_a_network_that_gets_smaller_between_steps_is_recorded_on(tmp_path: Path, blocks: str) -> None:
    width = 6 if blocks == "as many" else 600
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                model[0].weight = nn.Parameter(model[0].weight[: width // 2].detach())
                model[0].bias = nn.Parameter(model[0].bias[: width // 2].detach())
                model[2].weight = nn.Parameter(model[2].weight[:, : width // 2].detach())
                optimizer.param_groups[0]["params"] = list(model.parameters())
            if number == 3:
                by_hand = ByHand(model)
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                by_hand.before()
                optimizer.step()
                by_hand.after()
            else:
                plain_step(model, optimizer, batch)
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.distance_sqnorm[2:].isnull().all()  # θ₀ has other shapes
    assert steps.distance_sqnorm[:2].notnull().all()
    for layer, values in by_hand.rows[0].items():
        np.testing.assert_allclose(steps.grad_update[3].sel(layer=layer), values["grad_update"], rtol=1e-10)


def test_a_weight_that_is_split_up_for_a_while_has_its_distance_again(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer, start = torch.optim.SGD(model.parameters(), 0.1), [one.detach().clone() for one in model.parameters()]
    with (
        pytest.warns(match="added after recording began"),
        Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder,
    ):
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 1:
                nn.utils.parametrizations.weight_norm(model[2])
            if number == 2:
                nn.utils.parametrize.remove_parametrizations(model[2], "weight")
            optimizer.param_groups[0]["params"] = list(model.parameters())
            after = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
            expected = sum((one - was).square().sum().item() for one, was in zip(after, start, strict=True))
            plain_step(model, optimizer, batch)
    last = open_run(tmp_path / "run")["steps"].distance_sqnorm[-1]
    np.testing.assert_allclose(last.sum("layer", skipna=False), expected, rtol=1e-12)


class Half(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("kept", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("now", [(), ("weight",), ("weight", "bias")])
def test_a_network_is_again_what_it_was_with_other_parametrizations(
    kept: tuple[str, ...], now: tuple[str, ...]
) -> None:
    model, ((inputs, _),) = smooth_network(), vectors(1)
    for name in kept:
        parametrize.register_parametrization(model[2], name, Half())
    before, structure = model(inputs), Structure(model)
    for name in kept:
        if name not in now:
            parametrize.remove_parametrizations(model[2], name, leave_parametrized=False)
    for name in now:
        if name not in kept:
            parametrize.register_parametrization(model[2], name, Half())
    after = model(inputs)
    with structure.again():
        assert torch.equal(model(inputs), before)
    assert torch.equal(model(inputs), after)


def test_tensors_made_without_autograd_are_of_the_step_as_others_are(tmp_path: Path) -> None:
    """A frozen layer, an attribute, a buffer and the batches, none of which has a version."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = smooth_network()
            with torch.inference_mode():
                self.first, self.scale = nn.Linear(4, 4).requires_grad_(False), torch.tensor(0.5)
                self.register_buffer("shift", torch.ones(4))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.rest(self.first(inputs) * self.scale + self.shift)

    model, batches, losses = Scaled(), vectors(3), []
    with torch.inference_mode():
        batches = [(inputs.clone(), labels) for inputs, labels in batches]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            losses.append(plain_step(model, optimizer, batch).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_two_optimizers_of_the_same_parameters_one_after_the_other(tmp_path: Path) -> None:
    model, by_hand = smooth_network(), None
    adam, lbfgs = torch.optim.Adam(model.parameters(), 0.01), torch.optim.LBFGS(model.parameters(), 0.5, max_iter=2)
    by_hand = ByHand(model)
    with Recorder(tmp_path / "run", model, [adam, lbfgs], curvature_every=0) as recorder:
        for batch in recorder.watch(vectors(2)):
            adam.zero_grad()
            cross_entropy(model, batch).backward()
            by_hand.before()
            adam.step()
            by_hand.after()
        for (batch,) in zip(recorder.watch(vectors(2)), strict=True):

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                lbfgs.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                return loss

            closure()
            by_hand.before()
            lbfgs.step(closure)
            by_hand.after()
    steps = open_run(tmp_path / "run")["steps"]
    by_hand.agrees_with(steps)
    np.testing.assert_allclose(steps.learning_rate, [[0.01] * 2] * 2 + [[0.5] * 2] * 2)


def test_learning_rates_and_decay_are_of_what_is_trained(tmp_path: Path) -> None:
    model = smooth_network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                model[0].requires_grad_(True)
            plain_step(model, optimizer, batch)
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_allclose(steps.learning_rate, [[0.0, 0.1]] * 2 + [[0.1, 0.1]] * 2)
    assert (steps.decay_sqnorm.values > 0).tolist() == [[False, True]] * 2 + [[True, True]] * 2


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("how", [{"momentum": 0.9}, {"weight_decay": 0.1}])
def test_what_moves_a_frozen_layer_on_is_not_predicted(tmp_path: Path, how: dict, to_none: bool) -> None:
    model, losses, moves = smooth_network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, **how)
    said = pytest.warns(UserWarning, match="along steps that change frozen parameters, first '0.weight', is NaN")
    with nullcontext() if to_none else said:
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
            for number, (inputs, labels) in enumerate(recorder.watch(vectors(4))):
                model[0].requires_grad_(number != 2)
                optimizer.zero_grad(set_to_none=to_none)
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                before = model[0].weight.clone()
                optimizer.step()
                moves.append(not torch.equal(before, model[0].weight))
                losses.append((loss.item(), F.cross_entropy(model(inputs), labels).item()))
    curvature = open_run(tmp_path / "run")["curvature"]
    assert moves == [True, True, not to_none, True]
    for name in ("grad_update", "update_hess_update"):
        assert np.isnan(curvature[name]).any("layer").values.tolist() == [False, False, not to_none, False]
    assert np.isfinite(curvature.grad_hess_grad).all()
    np.testing.assert_allclose(np.stack([curvature.loss_before, curvature.loss_after], 1), losses, rtol=1e-12)


@pytest.mark.parametrize("by", ["noise", "LBFGS"])
def test_pruned_weights_that_are_moved_all_the_same_are_measured_where_they_are(tmp_path: Path, by: str) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.LBFGS(model.parameters()) if by == "LBFGS" else torch.optim.SGD(model.parameters(), 0.1)
    moves = pytest.warns(UserWarning, match=f"not zero after a step of {type(optimizer).__name__}")
    with moves, Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                Pruner(model, optimizer, "magnitude", granularity="weight").prune(0.5)

            def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                if by == "noise":
                    model[0].weight.grad += 0.01
                return loss

            losses.append(optimizer.step(closure).item())
            recorder.log(loss=losses[-1])
    assert (model[0].weight != 0).all()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_torch_prunings_in_a_row(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for _ in range(2):
            sizes = []
            with recorder.event("prune", probe=[batch]):
                model(batch[0])  # where torch makes the weight of what is left of it
                sizes.append(model[0].weight.square().sum().item())
                prune.l1_unstructured(model[0], "weight", amount=5)
                sizes.append(model[0].weight.square().sum().item())
            expected.append(sizes[0] - sizes[1])
            plain_step(model, optimizer, batch)
    sqnorm = open_run(tmp_path / "run")["pruning"].param_sqnorm.sel(layer="0")
    np.testing.assert_allclose(-sqnorm.diff("stage").squeeze(), expected, rtol=1e-10)


def test_a_closure_that_moves_the_parameters_first(tmp_path: Path) -> None:
    class Ascending(torch.optim.SGD):
        """Sharpness-aware: its gradient is that of a point further up."""

        def step(self, closure: Callable[[], Tensor]) -> Tensor:
            parameters = self.param_groups[0]["params"]
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(0.05)
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.sub_(0.05)
            super().step()
            return loss

    model, (batch,) = smooth_network(), vectors(1)
    optimizer = Ascending(model.parameters(), 0.1)
    before = flat(list(model.parameters()))
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    steps = open_run(tmp_path / "run")["steps"].sum("layer")
    np.testing.assert_allclose(steps.param_sqnorm[0], before.square().sum(), rtol=1e-10)
    update = flat(list(model.parameters())) - before
    np.testing.assert_allclose(steps.update_sqnorm[0], update.square().sum(), rtol=1e-10)


def test_what_happens_after_a_step_is_not_its_doing(tmp_path: Path) -> None:
    model = smooth_network()
    first, second = (torch.optim.SGD(model[index].parameters(), 0.1) for index in (0, 2))
    with Recorder(tmp_path / "run", model, [first, second], curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(4))):
            model.zero_grad()
            cross_entropy(model, batch).backward()
            (first, second)[number % 2].step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.clamp_(-0.3, 0.3)
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_allclose(steps.update_sqnorm, 0.01 * steps.grad_sqnorm, rtol=1e-10)


@pytest.mark.parametrize(
    "evaluated",
    [
        "after the step",
        "before the forward pass",
        "before the forward passes of two batches",
        "in an attack",
        "in parts",
    ],
)
def test_the_probe_is_in_the_mode_and_at_the_random_numbers_of_the_steps_forward_pass(
    tmp_path: Path, evaluated: str
) -> None:
    model, losses, pending = convolutional_network(dropout=0.5), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def trained(inputs: Tensor, labels: Tensor) -> float:
        model.train(evaluated != "in parts")
        for part in model:
            part.train()
        noise = torch.randn_like(inputs) * 0  # drawn after the batch was seen
        loss = F.cross_entropy(model(inputs + noise), labels)
        loss.backward()
        return loss.item()

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(images(4)):
            model.eval()
            if evaluated not in ("after the step", "in an attack"):
                model(inputs)  # without no_grad: many forget it
            if evaluated == "in an attack":
                F.cross_entropy(model(inputs.clone().requires_grad_()), labels).backward()
            pending.append((inputs, labels))
            if evaluated == "before the forward passes of two batches" and len(pending) < 2:
                continue
            optimizer.zero_grad()
            losses.append(sum(trained(*batch) for batch in pending) / len(pending))
            optimizer.step()
            pending = []
            if evaluated == "after the step":
                model.eval()
                with torch.no_grad():
                    model(inputs)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_gradient_that_is_clipped_by_value_says_which_of_two_forward_passes_began_the_step(tmp_path: Path) -> None:
    """Which random numbers the loss of two batches was drawn with: to be cut turns a gradient away from its own."""

    def objective(model: nn.Module, pair: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
        return sum(cross_entropy(model, batch) for batch in pair)

    torch.manual_seed(1)
    model, losses = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 3)), []
    optimizer, pairs = torch.optim.SGD(model.parameters(), 0.1), zip(vectors(8), vectors(8, seed=2), strict=True)
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for pair in recorder.watch(pairs):
            optimizer.zero_grad()
            losses.append(objective(model, pair))
            losses[-1].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, [loss.item() for loss in losses], rtol=1e-12)


@pytest.mark.parametrize("way", ["one backward pass", "a layer that is not always used", "clipped in between"])
def test_the_gradient_says_which_batches_a_step_is_of(tmp_path: Path, way: str) -> None:
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    optimizer = torch.optim.SGD(heads.parameters(), 0.1)
    losses: list[float] = []

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model[int(batch[1].sum()) % 2](batch[0]), batch[1])

    with Recorder(tmp_path / "run", heads, optimizer, objective=objective, curvature_every=1) as recorder:
        pending = []
        for number, batch in enumerate(recorder.watch(vectors(8))):
            pending.append(objective(heads, batch) / 2)
            if way != "one backward pass":
                pending[-1].backward()
            if way == "clipped in between":
                nn.utils.clip_grad_norm_(heads.parameters(), 100.0)
            if number % 2:
                if way == "one backward pass":
                    sum(pending).backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(sum(pending).item())
                pending = []
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_loss_that_takes_gradients(tmp_path: Path) -> None:
    def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs = batch[0].detach().clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), batch[1])
        return loss + torch.autograd.grad(loss, inputs, create_graph=True)[0].square().sum()

    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=penalised, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(2)):
            optimizer.zero_grad()
            loss = penalised(model, batch)
            loss.backward()
            optimizer.step()
            losses.append([loss.item(), penalised(model, batch).item()])
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(np.transpose([curvature.loss_before, curvature.loss_after]), losses, rtol=1e-12)


def test_a_loss_that_goes_backward_within_and_zeroes_the_gradients(tmp_path: Path) -> None:
    """Virtual adversarial training, as public repositories have it."""

    def unit(direction: Tensor) -> Tensor:
        return direction / direction.norm(dim=1, keepdim=True)

    def virtual_adversarial(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        with torch.no_grad():
            told = model(inputs).softmax(1)
        towards = unit(torch.rand(inputs.shape) - 0.5).requires_grad_()
        F.kl_div(model(inputs + towards).log_softmax(1), told, reduction="batchmean").backward()
        towards = unit(towards.grad)
        model.zero_grad()
        smooth = F.kl_div(model(inputs + towards).log_softmax(1), told, reduction="batchmean")
        return F.cross_entropy(model(inputs), labels) + smooth

    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=virtual_adversarial, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            losses.append(step_along(virtual_adversarial(model, batch), optimizer))
    is_of_its_steps(tmp_path / "run", losses)
    assert "zero_grad" not in vars(model)


def test_an_objective_may_return_one_number_in_any_shape(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model, batch).reshape(1)

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            plain_step(model, optimizer, batch)
        with recorder.event("look", probe=batches):
            pass
    assert open_run(tmp_path / "run")["curvature"].loss_before.dims == ("step",)


@pytest.mark.parametrize(
    ("made_of", "said"),
    [
        (lambda loss: {"loss": loss, "logits": 0}, "got a dict with the keys 'loss', 'logits': return the loss alone"),
        (lambda loss: (loss, 0), "got a tuple of 2: return the loss alone"),
        (lambda loss: loss.item(), "got the number 1.*, which has no gradient: return the tensor, without item"),
        (lambda loss: loss.expand(4), r"got one of shape \(4,\): return its mean"),
        (lambda loss: None, "got None: return the loss"),
        (lambda loss: loss.backward() or loss, r"second time .* If the objective calls backward\(\), leave that"),
    ],
)
def test_what_an_objective_should_have_returned_is_said(tmp_path: Path, made_of: Callable, said: str) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        return made_of(cross_entropy(model, batch))

    with (
        pytest.warns(UserWarning, match=f"(?s)not recorded from step 0 on: .*{said}"),
        Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder,
    ):
        for batch in recorder.watch(vectors(2)):
            plain_step(model, optimizer, batch)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_may_be_empty(tmp_path: Path, parts: int) -> None:
    """As Poisson sampling draws some, for differential privacy; a loss that is a sum is 0 on it, but for a penalty."""
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels, reduction="sum") + model[0].weight.square().sum()

    full = vectors(6)
    batches = [tuple(one[: 0 if number in (2, 3) else 8] for one in batch) for number, batch in enumerate(full)]
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(batches), 1):
            loss = objective(model, batch)
            loss.backward()
            if number % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        with recorder.event("look", probe=[batches[2]]):
            pass
    run = open_run(tmp_path / "run")
    if parts == 1:
        np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    assert run["curvature"].sizes["step"] == 6 / parts
    assert run["pruning"].sizes["event"] == 1


def test_an_objective_that_makes_an_optimizer_is_told_what_to_do_instead(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        torch.optim.SGD(model.parameters(), 0.1)  # of inner steps
        return cross_entropy(model, batch)

    with (
        pytest.warns(UserWarning, match=r"cannot make an optimizer .* itself, with torch\.autograd\.grad"),
        Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder,
    ):
        for batch in recorder.watch(vectors(2)):
            plain_step(model, optimizer, batch)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_shifts_no_logged_loss(tmp_path: Path, fused: bool, watched: bool) -> None:
    model, batches, losses = smooth_network(), vectors(6), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches) if watched else batches):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            scaler.scale(loss).backward()
            if number == 2:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            recorder.log(loss=loss)
            if fused or number != 2:
                losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, losses, rtol=1e-12)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_a_flush_between_step_and_log_costs_and_shifts_no_loss(tmp_path: Path, watched: bool, every: int) -> None:
    model, batches, losses = smooth_network(), vectors(5), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, every=every, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches) if watched else batches):
            loss = plain_step(model, optimizer, batch)
            if number in (2, 3):
                recorder.flush()
            recorder.log(loss=loss)
            losses.append(loss.item())
        recorder.flush()
        recorder.log(validation=0.25)
    steps = open_run(tmp_path / "run")["steps"]
    np.testing.assert_allclose(steps.loss, losses[::every], rtol=1e-12)
    np.testing.assert_array_equal(steps.validation, [np.nan] * (steps.sizes["step"] - 1) + [0.25])


def test_a_random_choice_in_the_loop_is_not_disturbed(tmp_path: Path) -> None:
    random.seed(3)
    expected = [random.random() for _ in range(3)]
    random.seed(3)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            plain_step(model, optimizer, batch)
            found.append(random.random())
    assert found == expected


def test_a_second_optimizer_that_takes_over_is_said(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"19 backward passes after step 4 led to no optimizer step.*both"):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
            for number, batch in enumerate(recorder.watch(vectors(25))):
                optimizer = torch.optim.Adam(model.parameters(), 0.01) if number == 5 else optimizer
                plain_step(model, optimizer, batch)
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 5


@pytest.mark.parametrize(("stages", "length"), [("abaa", 17), ("babb", 17), ("abaa", 16), ("aaaa", 40)])
def test_another_optimizer_that_takes_over_for_a_while_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, stages: str, length: int
) -> None:
    model = smooth_network()
    optimizers = {"a": torch.optim.SGD(model.parameters(), 0.1), "b": torch.optim.Adam(model.parameters(), 0.01)}
    recorded = optimizers[max(stages, key=stages.count)]
    with Recorder(tmp_path / "run", model, recorded, curvature_every=0) as recorder:
        for stage in stages:
            for batch in recorder.watch(vectors(length)):
                plain_step(model, optimizers[stage], batch)
    said = [str(one.message) for one in recwarn]
    if length == 17:
        (text,) = said
        assert text.startswith(
            "17 batches and backward passes in a row led to no optimizer step, but parameters changed"
        )
    else:
        assert not said


def test_a_loop_that_skips_many_steps_has_no_other_optimizer(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(vectors(50))):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            if not 5 <= number < 35:  # as where gradients overflow, or where a loop looks at gradients alone
                optimizer.step()


def test_a_network_that_is_made_anew_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 passes over watched data after step 5 led to no optimizer step.*made anew"):
        with Recorder(tmp_path / "run", *(present := trained()), curvature_every=0) as recorder:
            for epoch in range(4):
                present = trained() if epoch == 1 else present
                for batch in recorder.watch(vectors(6)):
                    plain_step(*present, batch)
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 6


def test_what_a_loop_does_after_its_training_is_no_training_that_was_missed(tmp_path: Path) -> None:
    model, optimizer = trained()
    average = torch.optim.swa_utils.AveragedModel(model)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for batch in recorder.watch(vectors(3)):
            plain_step(model, optimizer, batch)
        for batch in vectors(20):  # gradients of a step that is never taken
            recorder.observe(batch)
            F.cross_entropy(model(batch[0]), batch[1]).backward()
    with Recorder(tmp_path / "another", model, optimizer) as recorder:
        for batch in recorder.watch(vectors(3)):
            plain_step(model, optimizer, batch)
        for of in (vectors(20), vectors(30)):
            with torch.no_grad():
                for inputs, _ in recorder.watch(of):
                    average(inputs)
        for _ in range(4):
            next(iter(recorder.watch(vectors(1))))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_step_of_many_batches_without_backward_passes_is_right_or_refused(
    tmp_path: Path, *, compiled: bool, enabled: bool
) -> None:
    """The gradient is a sum that the loop computes itself, of 150 batches in eval mode."""
    network, optimizer = trained()
    model = (torch.compile(network, backend="eager") if compiled else network).eval()
    batches = vectors(150)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in batches:
            with torch.set_grad_enabled(enabled):
                recorder.observe(batch)
            with torch.no_grad():
                model(batch[0])
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        gradients = torch.autograd.grad(F.cross_entropy(network(inputs), labels), list(network.parameters()))
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        with (
            nullcontext()
            if enabled and compiled
            else pytest.warns(UserWarning, match="128 batches that were evaluated")
        ):
            optimizer.step()
        for batch in recorder.watch(vectors(3, seed=1)):
            plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    found = run["curvature"].grad_sqnorm
    assert found.step.values.tolist() == list(range(0 if enabled and compiled else 1, 4))
    np.testing.assert_allclose(found, run["steps"].grad_sqnorm.sel(step=found.step), rtol=1e-9)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = smooth_network()
    return model, torch.optim.SGD(model.parameters(), 0.1)


def many(alive: list[weakref.ref]) -> Iterator[tuple[Tensor, Tensor]]:
    """300 batches of their own; ``alive`` gets a reference to each one's inputs, which ends with them."""
    ((inputs, labels),) = vectors(1)
    for _ in range(300):
        batch = inputs.clone()
        alive.append(weakref.ref(batch))
        yield batch, labels


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_long_evaluation_keeps_no_batches_and_is_no_training(tmp_path: Path, *, compiled: bool, before: bool) -> None:
    network, optimizer = trained()
    model, alive = torch.compile(network, backend="eager") if compiled else network, []

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for batch in () if before else recorder.watch(vectors(3)):
            plain_step(model, optimizer, batch)
        model.eval()
        with torch.no_grad():
            for batch, _ in recorder.watch(many(alive)):
                model(batch)
                assert sum(reference() is not None for reference in alive) < 140
        model.train()
        for batch in recorder.watch(vectors(3)) if before else ():
            plain_step(model, optimizer, batch)
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.epoch.values.tolist() == [0, 0, 0]


def test_parametrizations_that_the_loop_computes_once_a_step(tmp_path: Path) -> None:
    layers = nn.utils.parametrizations.orthogonal(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)
    model, losses = nn.Sequential(*layers), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            with nn.utils.parametrize.cached():
                losses.append(plain_step(model, optimizer, batch))
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-9)


def test_an_optimizer_that_is_replaced_is_said_and_keeps_no_batches(tmp_path: Path) -> None:
    model, alive = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    with (
        pytest.warns(UserWarning, match="296 backward passes after step 2 led to no optimizer step"),
        pytest.warns(UserWarning, match="128 batches in a row led to no optimizer step"),
    ):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
            for number, batch in enumerate(recorder.watch(many(alive))):
                if number == 3:
                    optimizer = torch.optim.Adam(model.parameters(), 0.01)
                plain_step(model, optimizer, batch)
    assert sum(reference() is not None for reference in alive) < 140


def test_a_probe_is_gone_with_its_last_use() -> None:
    model, (batch,) = smooth_network(), vectors(1)
    gc.disable()
    try:
        probe = Probe(model, cross_entropy, [batch])
        probe.expand()
        reference = weakref.ref(probe)
        del probe
        assert reference() is None
    finally:
        gc.enable()


def test_the_middle_one_of_three_forward_passes_is_trained(tmp_path: Path) -> None:
    """As where a loop looks at its accuracy before and after, with gradients and dropout."""
    model, losses = convolutional_network(dropout=0.4), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(images(4)):
            model(inputs).argmax(1)
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            model(inputs).argmax(1)
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_hooks_of_optimizers_are_looked_for_at_steps_that_are_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for them takes a walk through all modules, which is a part of every step's cost otherwise."""
    model, looks = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @contextmanager
    def asleep(*arguments: object) -> Iterator[None]:
        looks.append(recorder._steps.number)
        yield

    monkeypatch.setattr("dynamics.recording.recorder.hooks_removed", asleep)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=4) as recorder:
        for batch in recorder.watch(vectors(9)):
            plain_step(model, optimizer, batch)
    assert set(looks) == {0, 4, 8}


def test_a_model_may_choose_the_kernel_of_its_attention(tmp_path: Path) -> None:
    """Of the faster ones none has a second derivative."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            self.inner, self.outer = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            q, k, v = self.inner(inputs)[:, None].chunk(3, -1)
            with sdpa_kernel(self.kernels):
                return self.outer(F.scaled_dot_product_attention(k, q, v)).mean((1, 2))

    torch.manual_seed(0)
    model = Attending().double()
    inputs, labels = torch.randn(8, 6, 4, dtype=torch.float64), torch.randint(3, (8,))
    plain = copy.deepcopy(model)
    plain.kernels = SDPBackend.MATH
    _, grad, hessian = dense(plain, (inputs, labels))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    curvature = recorded(tmp_path / "run", model, optimizer, [(inputs, labels)])["curvature"]
    assert not curvature.approximate.any()
    np.testing.assert_allclose(curvature.grad_hess_grad.sum("layer"), [grad @ hessian @ grad], rtol=1e-9)


def test_a_zero_grad_of_the_models_own_is_called(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        """What it forgets with its gradients is a part of its loss."""

        scale = 1.0

        def zero_grad(self, set_to_none: bool = True, *, forget: bool = False) -> None:
            self.scale = 2.0 if forget else self.scale

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model.zero_grad(forget=True)
        return model.scale * F.cross_entropy(model(batch[0]), batch[1])

    model, losses = Scaled(4, 3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            losses.append(step_along(objective(model, batch), optimizer))
    is_of_its_steps(tmp_path / "run", losses)
