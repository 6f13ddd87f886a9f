"""Micro-batches need count neither equally nor by their samples: the gradient that was applied says in what shares."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import curvature_by_hand
from networks import smooth_network, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run

Batch = tuple[Tensor, Tensor]


class Tokens(nn.Module):
    """Which token comes next, from the mean of those before."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(7, 6), nn.Dropout(dropout), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.embedding(tokens)).cumsum(1)))


def of_tokens(model: nn.Module, batch: Batch, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), ignore_index=-1, reduction=reduction)


def texts(count: int) -> list[Batch]:
    """Of different lengths, padded with −1."""
    found = []
    for _ in range(count):
        tokens, following = torch.randint(7, (2, 4, 9))
        lengths = torch.randint(2, 9, (4, 1))
        found.append((tokens, following.where(torch.arange(9) < lengths, -1)))
    return found


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_by_their_tokens(tmp_path: Path, dropout: float, clipped: bool) -> None:
    """As language models are trained: the mean over the tokens of all micro-batches."""
    model, micro_batches, by_hand = Tokens(dropout).double(), 3, []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, objective=of_tokens, curvature_every=1) as recorder:
        for _ in range(4):
            several = texts(micro_batches)
            total = sum((labels >= 0).sum() for _, labels in several)
            optimizer.zero_grad()
            losses = []
            for batch in several:
                recorder.observe(batch)
                losses.append(of_tokens(model, batch, "sum") / total)
                losses[-1].backward(retain_graph=True)
            by_hand.append(curvature_by_hand(sum(losses), list(model.parameters())))
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            recorder.log(loss=sum(losses))
    compare(tmp_path / "run", by_hand)


@pytest.mark.parametrize("weights", [(1.0, 0.3, 0.2), (0.0, 1.0, 0.5)])
def test_by_what_the_loop_multiplies_them_with(tmp_path: Path, weights: Sequence[float]) -> None:
    """One that counts for nothing among them. The loss is their mean."""
    model, by_hand = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        batches = recorder.watch(vectors(9))
        for several in zip(*[iter(batches)] * 3, strict=True):
            optimizer.zero_grad()
            losses = [F.cross_entropy(model(inputs), labels) for inputs, labels in several]
            for weight, loss in zip(weights, losses, strict=True):
                (weight * loss).backward(retain_graph=True)
            mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
            by_hand.append(curvature_by_hand(mean, list(model.parameters())))
            optimizer.step()
    compare(tmp_path / "run", by_hand)


def test_shares_that_many_batches_could_always_have_are_none(tmp_path: Path) -> None:
    """More micro-batches than parameters: they could make up any gradient, another's too."""
    model = nn.Linear(2, 1, bias=False).double()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    objective = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        batches = torch.randn(4, 5, 2, dtype=torch.float64)
        for batch in batches:
            recorder.observe(batch)
            loss = objective(model, batch)
            losses.append(loss.item())
            (loss / len(batches)).backward()
        model.weight.grad += torch.tensor([[0.02, -0.01]])  # noise
        optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].loss_before.item() == pytest.approx(np.mean(losses), rel=1e-12)


def compare(path: Path, by_hand: list[dict[str, float]]) -> None:
    curvature = open_run(path)["curvature"]
    for name in by_hand[0]:
        found = curvature[name].sum("layer", skipna=False) if "layer" in curvature[name].dims else curvature[name]
        np.testing.assert_allclose(found, [row[name] for row in by_hand], rtol=1e-8, err_msg=name)
