"""What loops do, in combination: each step's row and curvature are of its own batches, each loss of its own step."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Batch, cross_entropy, prefetched, smooth_network, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run


def assert_losses(path: Path, losses: list[float]) -> None:
    run = open_run(path)
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_that_skips_one_of_several_steps_of_a_batch(tmp_path: Path, fused: bool) -> None:
    model, losses, number = smooth_network(), [], 0
    optimizer, scaler = torch.optim.Adam(model.parameters(), 0.01, fused=fused), torch.amp.GradScaler("cpu", 64.0)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            for _ in range(3):
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                scaler.scale(loss).backward()
                if number == 4:
                    model[0].weight.grad[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                recorder.log(loss=loss)
                if fused or number != 4:
                    losses.append(loss.item())
                number += 1
    assert_losses(tmp_path / "run", losses)


def test_accumulation_and_then_a_step_on_the_last_batch_alone(tmp_path: Path) -> None:
    model, losses, parts = smooth_network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(6))):
            parts.append(cross_entropy(model, batch))
            (parts[-1] / 2).backward()
            recorder.log(loss=parts[-1])
            if number % 2:
                for again in (False, True):
                    if again:
                        parts = [cross_entropy(model, batch)]
                        parts[0].backward()
                        recorder.log(loss=parts[0])
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(np.mean([part.item() for part in parts]))
                parts = []
    assert_losses(tmp_path / "run", losses)


def test_accumulation_over_batches_that_are_read_ahead(tmp_path: Path) -> None:
    model, losses, parts = smooth_network(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for _ in range(2):
            for number, batch in enumerate(prefetched(recorder.watch(vectors(6)))):
                loss = cross_entropy(model, batch)
                (loss / 2).backward()
                recorder.log(loss=loss)
                parts.append(loss.item())
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(np.mean(parts))
                    parts = []
    assert_losses(tmp_path / "run", losses)


def test_a_loader_that_refills_its_batch_and_two_optimizers(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.Adam(model[2].parameters(), 0.01)]
    inputs, labels = torch.empty(16, 4), torch.empty(16, dtype=torch.long)

    def stream() -> Iterator[Batch]:
        for new_inputs, new_labels in vectors(3):
            yield inputs.copy_(new_inputs), labels.copy_(new_labels)

    with Recorder(tmp_path / "run", model, optimizers, curvature_every=1) as recorder:
        for batch in recorder.watch(stream()):
            for _ in range(2):
                model.zero_grad()
                loss = cross_entropy(model, batch)
                recorder.log(loss=loss)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                losses.append(loss.item())
    assert_losses(tmp_path / "run", losses)


def test_adversarial_training(tmp_path: Path) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in vectors(3):
            shift = torch.zeros_like(inputs, requires_grad=True)
            for _ in range(3):
                F.cross_entropy(model(inputs + shift), labels).backward()  # adds to the model's gradients as well
                shift.data = (shift + 0.1 * shift.grad.sign()).clamp(-0.2, 0.2)
                shift.grad.zero_()
            batch = (inputs + shift).detach(), labels
            recorder.observe(batch)
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            losses.append(loss.item())
    assert_losses(tmp_path / "run", losses)


def test_two_watched_loaders_side_by_side(tmp_path: Path) -> None:
    def objective(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return cross_entropy(model, batch) if len(batch) == 2 else model(batch[0]).square().mean()

    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unlabelled = [(inputs,) for inputs, _ in vectors(5, seed=2)]
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for one, other in zip(recorder.watch(vectors(5)), recorder.watch(unlabelled), strict=True):
            optimizer.zero_grad()
            loss = (objective(model, one) + objective(model, other)) / 2
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            losses.append(loss.item())
    assert_losses(tmp_path / "run", losses)


def test_free_adversarial_training_moves_its_noise_before_the_step(tmp_path: Path) -> None:
    """Shafahi et al. 2019: the noise, which the objective knows, takes its step between backward pass and step."""
    model, losses, noise, squares = smooth_network(), [], torch.zeros(16, 4), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def objective(model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch[0] + noise), batch[1])

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(2)):
            for _ in range(3):
                own = noise.clone().requires_grad_()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs + own), labels)
                loss.backward()
                losses.append(loss.item())
                squares.append(sum(one.grad.square().sum().item() for one in model.parameters()))
                noise += 0.3 * own.grad.sign()
                optimizer.step()
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(curvature.loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm.sum("layer"), squares, rtol=1e-9)


def test_a_baseline_that_moves_before_the_step(tmp_path: Path) -> None:
    model, losses, baseline = smooth_network(), [], 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        states, actions, rewards = batch
        chosen = model(states).log_softmax(1).gather(1, actions[:, None])[:, 0]
        return -(chosen * (rewards - baseline)).mean()

    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for number, (states, actions) in enumerate(vectors(4)):
            batch = states, actions, states.square().sum(1) + number
            recorder.observe(batch)
            loss = objective(model, batch)
            baseline = 0.5 * baseline + 0.5 * batch[2].mean().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)
