"""BatchNorm in training mode makes a loss blind to a filter's length: θ_fᵀg_f = 0 and θ_fᵀ(Hg)_f = −‖g_f‖²."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynamics.models import VGG
from dynamics.probe import Probe, cross_entropy_objective

Make = Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]


def smooth_batch_norm_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(),
        nn.Flatten(), nn.Linear(3 * 16, 5),
    )  # fmt: skip
    return model, (torch.randn(16, 2, 8, 8), torch.randint(5, (16,)))


def vgg() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = VGG([4, 4, "M", 8, "M", 8, "M", 8, "M", 8, "M"], num_classes=3, in_channels=1)
    return model, (torch.randn(32, 1, 32, 32), torch.randint(3, (32,)))


def per_filter(make: Make, mode: str, epsilon: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """θ_fᵀg_f, θ_fᵀ(Hg)_f and ‖g_f‖² of each filter, one triple a normalised convolution."""
    model, batch = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    expansion = Probe(model, cross_entropy_objective, [batch], mode=mode).expand()
    products = expansion.hessian_product(expansion.grad)
    triples = []
    for theta, grad, product in zip(expansion.theta.values(), expansion.grad, products, strict=True):
        if theta.ndim == 4:
            theta, grad, product = (tensor.detach().flatten(1) for tensor in (theta, grad, product))
            triples.append(((theta * grad).sum(1), (theta * product).sum(1), grad.square().sum(1)))
    return triples


@pytest.mark.parametrize("make", [smooth_batch_norm_network, vgg])
def test_both_identities_hold_in_training_mode(make: Make) -> None:
    for param_grad, param_hess_grad, grad_sqnorm in per_filter(make, "train", 1e-14):
        torch.testing.assert_close(param_grad, torch.zeros_like(param_grad), atol=1e-12, rtol=0)
        torch.testing.assert_close(param_hess_grad, -grad_sqnorm, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("make", [smooth_batch_norm_network, vgg])
@pytest.mark.parametrize("index", [1, 2])
def test_neither_holds_in_eval_mode(make: Make, index: int) -> None:
    for triple in per_filter(make, "eval", 1e-14):
        expected = (0, torch.zeros_like(triple[0]), -triple[2])[index]
        assert not torch.allclose(triple[index - 1], expected, rtol=0.1, atol=1e-4)


def test_the_identity_survives_the_default_epsilon_of_a_vgg() -> None:
    model, batch = vgg()
    expansion = Probe(model, cross_entropy_objective, [batch], mode="train").expand()
    # VGG normalises after the ReLU, which is homogeneous: the filter's length drops out all the same.
    for name, grad in zip(expansion.theta, expansion.grad, strict=True):
        if grad.ndim == 4:
            theta = expansion.theta[name].detach()
            alignment = (theta * grad).flatten(1).sum(1) / (theta.flatten(1).norm(dim=1) * grad.flatten(1).norm(dim=1))
            assert float(alignment.abs().max()) < 1e-2
