"""Small networks, batches and loops that several tests record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.pruning import apply_masks

Batch = tuple[Tensor, Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the recorder takes by default, written as users write it."""
    return F.cross_entropy(model(batch[0]), batch[1])


def smooth_network() -> nn.Sequential:
    """43 parameters, no kinks: every derivative of the loss exists."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def convolutional_network(dropout: float = 0.0) -> nn.Sequential:
    """Convolution, BatchNorm and dropout: state that a careless probe would move."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


def normalised_network() -> nn.Sequential:
    """Of the :func:`sequences`, each vector for itself."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def attention_network() -> nn.Sequential:
    """Of the :func:`vectors`, each number for itself."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Linear(4, 8), layer, nn.Flatten(), nn.Linear(8, 3))


def vectors(batches: int, seed: int = 1) -> list[Batch]:
    """Batches of 16 for :func:`smooth_network`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 4, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator))
        for _ in range(batches)
    ]


def sequences(batches: int) -> list[Batch]:
    """Batches of 4 sequences of 4 vectors, each of which has a label, for :func:`normalised_network`."""
    return [(inputs.view(4, 4, 4), labels.view(4, 4)) for inputs, labels in vectors(batches)]


def images(batches: int, seed: int = 1, size: int = 8) -> list[Batch]:
    """Batches of 1 × 6 × 6 images for :func:`convolutional_network`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def prefetched(batches: Iterable[Batch], ahead: int = 1) -> Iterator[Batch]:
    """The batches, each read so many before it is used, as by a loader that copies while a network computes."""
    waiting: list[Batch] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss


def step_along(loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """The step that a loss leads to; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def closure_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, *, by_name: bool = False) -> Tensor:
    """One training step whose gradient a closure takes, handed by its place or by its name; returns the loss."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return optimizer.step(closure=closure) if by_name else optimizer.step(closure)


def recorded(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    step: Callable[[nn.Module, torch.optim.Optimizer, Batch], Tensor] = plain_step,
    **settings: object,
) -> xr.DataTree:
    """The record of a training on the batches."""
    with Recorder(path, model, optimizer, **settings) as recorder:
        for batch in recorder.watch(batches):
            step(model, optimizer, batch)
    return open_run(path)


def losses_of_steps(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable, batches: list[Batch]
) -> list[float]:
    """Train on the batches, recorded if there is a path: then curvature is measured at the loop's own loss."""
    losses = []
    recorder = Recorder(path, model, optimizer, objective=loss_of, curvature_every=2) if path else None
    for batch in recorder.watch(batches) if recorder else batches:
        losses.append(step_along(loss_of(model, batch), optimizer))
    if recorder:
        recorder.close()
        run = open_run(path)
        np.testing.assert_allclose(run["curvature"].loss_before, losses[::2], rtol=1e-12)
        np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm[::2], rtol=1e-9)
    return losses


def all_but_row(shape: torch.Size, row: int) -> Tensor:
    """A mask."""
    kept = torch.ones(shape, dtype=torch.bool)
    kept[row] = False
    return kept


def prune_row(model: nn.Module, weight: str, row: int) -> None:
    apply_masks(model, {weight: all_but_row(model.get_parameter(weight).shape, row)})


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """One vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def dense(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """θ, g and the dense Hessian H of the mean cross-entropy, by torch.func on the flattened parameters."""
    theta, loss = flat(list(model.parameters())), flat_loss(model, batch)
    return theta, torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)


def flat_loss(model: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy as a function of the flattened parameters."""
    names, shapes = zip(*((name, parameter.shape) for name, parameter in model.named_parameters()), strict=True)

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        values = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])

    return loss
