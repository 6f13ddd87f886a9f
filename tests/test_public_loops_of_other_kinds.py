"""More loops as their authors write them: optimizers that share networks, masks in the forward pass, lazy penalties."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand, curvature_by_hand
from networks import Batch, smooth_network, vectors
from test_public_loops import agree_with_autograd, theta_of
from torch import Tensor, nn

from dynamics import Recorder, open_run


def agrees(path: Path, by_hand: ByHand, losses: list[float]) -> None:
    """The record says of each step what was computed beside it."""
    run = open_run(path)
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    assert np.isfinite(run["curvature"].grad_hess_grad).all()


def test_infogan(tmp_path: Path) -> None:
    """The third optimizer trains both networks, of which the first two train one each."""
    generator = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
    networks = nn.ModuleDict({"G": generator, "D": nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))})
    parts = networks["G"].parameters(), networks["D"].parameters(), networks.parameters()
    optimizers = [torch.optim.Adam(part, 0.01) for part in map(list, parts)]

    def objective(networks: nn.ModuleDict, batch: tuple) -> Tensor:
        kind, noise, real, labels = batch
        found = networks["D"](networks["G"](noise))
        if kind == "G":
            return F.softplus(-found[:, 0]).mean()
        if kind == "D":
            fake = networks["D"](networks["G"](noise).detach())
            return (F.softplus(-networks["D"](real)[:, 0]) + F.softplus(fake[:, 0])).mean()
        return F.cross_entropy(found[:, 1:], labels)

    by_hand, losses = ByHand(networks), []
    with Recorder(tmp_path / "run", networks, optimizers, objective=objective, curvature_every=1) as recorder:
        for (real, labels), (number, kind) in itertools.product(vectors(2), enumerate(("G", "D", "info"))):
            batch = kind, torch.randn(16, 5), real, labels
            optimizers[number].zero_grad()
            recorder.observe(batch)
            theta, loss = theta_of(networks), objective(networks, batch)
            loss.backward()
            held = [one for group in optimizers[number].param_groups for one in group["params"]]
            by_hand.before(held)
            optimizers[number].step()
            by_hand.after()
            recorder.log(loss=loss)
            losses.append(loss.item())
    agrees(tmp_path / "run", by_hand, losses)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, losses, rtol=1e-12)
    agree_with_autograd(open_run(tmp_path / "run"), 5, networks, theta, lambda: objective(networks, batch))


def test_stylegan2_has_a_step_of_its_own_for_its_lazy_penalty(tmp_path: Path) -> None:
    discriminator = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 1))
    generator = nn.Linear(3, 4)
    optimizers = [torch.optim.Adam(one.parameters(), 0.01, betas=(0.0, 0.99)) for one in (discriminator, generator)]

    def objective(discriminator: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        if len(batch) == 2:
            return F.softplus(-discriminator(batch[0])).mean() + F.softplus(discriminator(batch[1])).mean()
        real = batch[0].clone().requires_grad_()
        slope = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)[0]
        return 10 * slope.square().sum(1).mean()

    by_hand, losses = ByHand(discriminator), []
    with Recorder(tmp_path / "run", discriminator, optimizers[0], objective=objective, curvature_every=1) as recorder:
        for number, (real, _) in enumerate(vectors(4)):
            for trains in (True, False):
                discriminator.requires_grad_(trains)
                generator.requires_grad_(not trains)
                fake = generator(torch.randn(16, 3))
                if not trains:
                    optimizers[1].zero_grad()
                    F.softplus(-discriminator(fake)).mean().backward()
                    optimizers[1].step()
                    continue
                for batch in ((real, fake.detach()), (real,))[: 1 + (number % 2 == 0)]:
                    recorder.observe(batch)
                    optimizers[0].zero_grad()
                    theta, loss = theta_of(discriminator), objective(discriminator, batch)
                    loss.backward()
                    by_hand.before()
                    optimizers[0].step()
                    by_hand.after()
                    losses.append(loss.item())
    agrees(tmp_path / "run", by_hand, losses)
    discriminator.requires_grad_(True)
    run = open_run(tmp_path / "run")
    agree_with_autograd(run, 5, discriminator, theta, lambda: objective(discriminator, batch))


@pytest.mark.parametrize("rounds", [1, 2])
def test_stylegan3_freezes_a_network_before_its_optimizer_steps(tmp_path: Path, rounds: int) -> None:
    """NVlabs/stylegan3: phase.module.requires_grad_(True), rounds of backward passes, requires_grad_(False), step."""
    torch.manual_seed(0)
    generator, critic = smooth_network(), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    networks = nn.ModuleDict({"generator": generator, "critic": critic}).requires_grad_(False)
    phases = [(name, torch.optim.Adam(network.parameters(), 0.01)) for name, network in networks.items()]

    def objective(networks: nn.ModuleDict, batch: tuple[str, Tensor]) -> Tensor:
        name, latent = batch
        score = networks["critic"](networks["generator"](latent))
        return F.softplus(-score if name == "generator" else score).mean()

    found = []
    with Recorder(
        tmp_path / "run", networks, [one for _, one in phases], objective=objective, curvature_every=1
    ) as recorder:
        for latent, _ in vectors(3):
            for name, optimizer in phases:
                optimizer.zero_grad(set_to_none=True)
                networks[name].requires_grad_(True)
                losses = []
                for part in latent.chunk(rounds):
                    recorder.observe((name, part))
                    losses.append(objective(networks, (name, part)))
                by_hand = curvature_by_hand(sum(losses) / rounds, list(networks[name].parameters()))
                for loss in losses:
                    (loss / rounds).backward()
                networks[name].requires_grad_(False)
                optimizer.step()
                found.append(by_hand)
    curvature = open_run(tmp_path / "run")["curvature"]
    for name in found[0]:
        recorded = curvature[name].sum("layer") if "layer" in curvature[name].dims else curvature[name]
        np.testing.assert_allclose(recorded, [one[name] for one in found], rtol=1e-8, err_msg=name)


class Masked(nn.Module):
    """As open_lth's: each forward pass sets to zero, in place, what is pruned and has been moved since."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", torch.rand(5, 4) > 0.4)

    def forward(self, inputs: Tensor) -> Tensor:
        self.model[0].weight.data *= self.mask
        return self.model(inputs)


def test_masks_that_the_forward_pass_applies_in_place(tmp_path: Path) -> None:
    model = Masked(smooth_network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    by_hand, losses, after = ByHand(model), [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(4)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            assert (model.model[0].weight[~model.mask] != 0).all()
            losses.append(loss.item())
            moved = model.model[0].weight.detach().clone()
            after.append(F.cross_entropy(model(inputs), labels).item())
            model.model[0].weight.data.copy_(moved)
    agrees(tmp_path / "run", by_hand, losses)
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_after, after, rtol=1e-12)


def test_gradients_that_another_copy_of_the_network_hands_over(tmp_path: Path) -> None:
    """As asynchronous actors and critics: the network that is trained does not run itself."""
    shared, local = smooth_network(), smooth_network()
    optimizer, by_hand, losses = torch.optim.Adam(shared.parameters(), 0.01), ByHand(shared), []
    with Recorder(tmp_path / "run", shared, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(4)):
            local.load_state_dict(shared.state_dict())
            local.zero_grad()
            loss = F.cross_entropy(local(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(local.parameters(), 0.1)
            for one, other in zip(local.parameters(), shared.parameters(), strict=True):
                other.grad = one.grad
            by_hand.before()
            theta = theta_of(shared)
            optimizer.step()
            by_hand.after()
            recorder.log(loss=loss)
            losses.append(loss.item())
    agrees(tmp_path / "run", by_hand, losses)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, losses, rtol=1e-12)
    agree_with_autograd(open_run(tmp_path / "run"), 3, shared, theta, lambda: F.cross_entropy(shared(inputs), labels))


class Layer(nn.Linear):
    """As in PyTorch's example of the forward-forward algorithm: a layer trains itself, by a method named train."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.optimizer = torch.optim.Adam(self.parameters(), 0.03)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x / (x.norm(2, 1, keepdim=True) + 1e-4)))

    def loss(self, good: Tensor, bad: Tensor) -> Tensor:
        goodness = [self(x).square().mean(1) for x in (good, bad)]
        return F.softplus(torch.cat([2 - goodness[0], goodness[1] - 2])).mean()

    def train(self, good: Tensor, bad: Tensor, step: Callable) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            step(self, good, bad)
        return self(good).detach(), self(bad).detach()


def test_forward_forward(tmp_path: Path) -> None:
    layers, losses = nn.ModuleList([Layer(4, 6), Layer(6, 5)]), []
    by_hand = ByHand(layers)

    def step(layer: Layer, good: Tensor, bad: Tensor) -> None:
        recorder.observe((list(layers).index(layer), good, bad))
        loss = layer.loss(good, bad)
        layer.optimizer.zero_grad()
        loss.backward()
        by_hand.before(list(layer.parameters()))
        layer.optimizer.step()
        by_hand.after()
        losses.append(loss.item())

    with Recorder(
        tmp_path / "run", layers, [layer.optimizer for layer in layers], curvature_every=1,
        objective=lambda layers, batch: layers[batch[0]].loss(*batch[1:]),
    ) as recorder:  # fmt: skip
        good, bad = torch.rand(7, 4), torch.rand(7, 4)
        for layer in layers:
            good, bad = layer.train(good, bad, step)
    agrees(tmp_path / "run", by_hand, losses)


@pytest.mark.parametrize("every", [1, 2])
def test_teacher_forcing_by_pythons_own_random_numbers(tmp_path: Path, every: int) -> None:
    parts = {"embedding": nn.Embedding(7, 5), "encoder": nn.GRU(5, 5), "decoder": nn.GRU(5, 5), "out": nn.Linear(5, 7)}
    model = nn.ModuleDict(parts)
    halves = (
        [*parts["embedding"].parameters(), *parts["encoder"].parameters()],
        [
            *parts["decoder"].parameters(),
            *parts["out"].parameters(),
        ],
    )
    optimizers = [torch.optim.Adam(half, rate) for half, rate in zip(halves, (0.01, 0.05), strict=True)]

    def objective(model: nn.ModuleDict, pair: Batch) -> Tensor:
        hidden = model["encoder"](model["embedding"](pair[0]))[1]
        word, forced, loss = pair[1][:1] * 0, random.random() < 0.5, 0.0
        for target in pair[1].split(1):
            output, hidden = model["decoder"](model["embedding"](word), hidden)
            logits = model["out"](output)
            loss = loss + F.cross_entropy(logits, target)
            word = target if forced else logits.argmax(1)
        return loss

    by_hand, losses = ByHand(model), []
    with Recorder(tmp_path / "run", model, optimizers, objective=objective, curvature_every=every) as recorder:
        for number in range(6):
            pair = torch.randint(7, (3 + number % 2,)), torch.randint(7, (4,))
            recorder.observe(pair)
            model.zero_grad()
            loss = objective(model, pair)
            loss.backward()
            for half in halves:
                nn.utils.clip_grad_norm_(half, 1.0)
            by_hand.before()
            for optimizer in optimizers:
                optimizer.step()
            by_hand.after()
            losses.append(loss.item())
    agrees(tmp_path / "run", by_hand, losses[::every])
