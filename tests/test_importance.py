"""Scores that the reference does not hold, the arguments of `scores`, and that scoring leaves no trace."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, images
from torch import nn

from dynamics.models import build
from dynamics.pruning import MEASURES, scores


def test_fisher_equals_a_loop_over_samples() -> None:
    model, batches = convolutional_network().eval(), images(2, size=5)
    found = scores(model, batches, "fisher", temperature=2.0)["0"]
    squares = torch.zeros(4)
    for inputs, labels in batches:
        for sample, target in zip(inputs.split(1), labels.split(1), strict=True):
            (grad,) = torch.autograd.grad(F.cross_entropy(model(sample) / 2, target), [model[0].weight])
            squares += (model[0].weight.detach() * grad).flatten(1).sum(1).square()
    torch.testing.assert_close(found, squares / 10 / 2)


@pytest.mark.parametrize("measure", [name for name, row in MEASURES.items() if not row.per_filter])
def test_weights_scores_make_the_filters(measure: str) -> None:
    model, batches = convolutional_network(), images(2)
    filters = scores(model, batches, measure)["0"]
    weights = scores(model, batches, measure, granularity="weight")["0"]
    assert weights.shape == model[0].weight.shape
    sums = weights.flatten(1).sum(1)
    expected = {"magnitude": sums.sqrt(), "gradient_norm_preservation": sums.abs(), "taylor": sums.abs()}
    torch.testing.assert_close(filters, expected.get(measure, sums))


@pytest.mark.parametrize("measure", ["loss_preservation", "gradient_norm_increase", "fisher"])
def test_data_may_come_in_any_pieces(measure: str) -> None:
    model, ((inputs, labels),) = convolutional_network(), images(1, size=12)
    pieces = list(zip(inputs.split(5), labels.split(5), strict=True))
    whole = scores(model, [(inputs, labels)], measure)
    torch.testing.assert_close(scores(model, pieces, measure), whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "random"])
def test_scoring_leaves_no_trace(measure: str, mode: str) -> None:
    model, batches = convolutional_network(dropout=0.4), images(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    scores(model, batches, measure, mode=mode)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_mode_matters() -> None:
    model, batches = convolutional_network(), images(2)
    train, evaluated = (scores(model, batches, "gradient_norm_increase", mode=mode)["0"] for mode in ("train", "eval"))
    assert not torch.allclose(train, evaluated, rtol=0.1)


def test_bad_arguments_are_said(tmp_path: Path) -> None:
    model, batches = convolutional_network(), images(1)
    with pytest.raises(ValueError, match="unknown measure 'magic': choose one of magnitude, loss_preservation"):
        scores(model, batches, "magic")
    with pytest.raises(ValueError, match="loss_preservation needs data"):
        scores(model, None, "loss_preservation")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        scores(model, batches, "taylor", temperature=0)
    with pytest.raises(ValueError, match="got 'channel', 'eval'"):
        scores(model, batches, "taylor", granularity="channel")
    with pytest.raises(ValueError, match="got 'filter', 'test'"):
        scores(model, batches, "taylor", mode="test")
    with pytest.raises(ValueError, match="no score for single weights"):
        scores(model, batches, "fisher", granularity="weight")
    with pytest.raises(ValueError, match="bn_scale needs a normalisation"):
        scores(nn.Sequential(nn.Conv2d(1, 2, 3)), None, "bn_scale")
    with pytest.raises(ValueError, match="layer '0' has 2 groups"):
        scores(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), None, "magnitude")

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 2, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.convolution(inputs) if inputs.sum() > 0 else inputs

    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx"):
        scores(Branching(), None, "magnitude")


@pytest.mark.parametrize(
    ("name", "layers", "filters"), [("vgg13", 10, 2944), ("mobilenet_v1", 14, 5984), ("resnet56", 57, 2128)]
)
def test_every_measure_ranks_all_filters(name: str, layers: int, filters: int) -> None:
    found = scores(build(name, num_classes=10), None, "magnitude")
    assert len(found) == layers
    assert sum(len(values) for values in found.values()) == filters
