"""Hessian products by differences, where autograd has no second derivative, beside the dense Hessian in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynamics.curvature.differences import extrapolated
from dynamics.curvature.expansion import Expansion


class Same(torch.autograd.Function):
    """x, whose backward pass is ``once_differentiable``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


SCALES = {"ordinary": (1.0, 1.0), "sharp": (20.0, 1.0), "large": (1.0, 30.0), "sharp and large": (20.0, 30.0)}


def losses(inputs: float, weights: float) -> tuple[Callable, Callable, dict[str, Tensor]]:
    """A loss, the same without a second derivative, and θ, in float64; the second weight is of another size."""
    x, labels = inputs * torch.randn(32, 6), torch.randint(3, (32,))
    theta = {"a": torch.randn(8, 6) / 6**0.5, "b": weights * torch.randn(3, 8)}

    def plain(theta: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.tanh(x.to(theta["a"]) @ theta["a"].T) @ theta["b"].T / weights, labels)

    def once(theta: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(Same.apply(torch.tanh(x.to(theta["a"]) @ theta["a"].T)) @ theta["b"].T / weights, labels)

    return plain, once, theta


def trained(loss: Callable, theta: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    """θ after steps of Newton's kind, so that the gradient all but vanishes."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    optimizer = torch.optim.LBFGS(leaves.values(), max_iter=steps, tolerance_grad=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(leaves) + 1e-3 * leaves["a"].square().sum() + 1e-3 * leaves["b"].square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("direction", ["gradient", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("scale", SCALES)
def test_a_product_is_right_whatever_the_scale(scale: str, steps: int, dtype: torch.dtype, direction: str) -> None:
    plain, once, theta = losses(*SCALES[scale])
    theta = trained(plain, theta, steps) if steps else theta
    theta = {name: tensor.to(dtype) for name, tensor in theta.items()}
    expansion = Expansion([once], [1.0], theta)
    vector = (
        expansion.grad if direction == "gradient" else [torch.randn(one.shape, dtype=dtype) for one in theta.values()]
    )
    found = torch.cat([one.flatten() for one in expansion.hessian_product(vector)]).double()
    exact = Expansion([plain], [1.0], {name: one.double() for name, one in theta.items()})
    expected = torch.cat([one.flatten() for one in exact.hessian_product([one.double() for one in vector])])
    assert not expansion.exact
    assert exact.exact
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < (1e-3 if dtype == torch.float32 else 1e-6)


def of(function: Callable[[float], float], tried: list[float]) -> Callable[[float], list[Tensor]]:
    """Its central differences at zero, as tensors."""

    def difference(distance: float) -> list[Tensor]:
        tried.append(distance)
        return [torch.tensor([(function(distance) - function(-distance)) / (2 * distance)])]

    return difference


def test_distances_that_agree_are_the_last_ones() -> None:
    tried: list[float] = []
    (found,) = extrapolated(of(math.sin, tried), 0.04, 1e-3)
    assert abs(found.item() - 1) < 1e-8  # of order ε⁴: the nearer difference itself is off by 2e-5
    assert tried == [0.04, 0.01]


@pytest.mark.parametrize(("distance", "larger"), [(1e-4, True), (3.0, False)])
def test_a_distance_that_is_too_small_or_too_large_is_given_up(distance: float, larger: bool) -> None:
    tried: list[float] = []
    (found,) = extrapolated(of(lambda x: math.sin(x) + 1e-6 * math.sin(1e9 * x), tried), distance, 1e-4)
    assert abs(found.item() - 1) < 5e-4  # at 1e-4 noise makes 1e-2 of it
    assert (max(tried) > distance) == larger


@pytest.mark.parametrize("value", [0.0, 2.0, math.nan])
def test_a_constant_is_known_after_two_and_no_number_after_all(value: float) -> None:
    tried: list[float] = []
    (found,) = extrapolated(lambda distance: [tried.append(distance), torch.tensor([value])][1:], 0.1, 1e-4)
    assert found.isnan().item() if math.isnan(value) else found.item() == value
    assert len(tried) == 2 or math.isnan(value)


def test_a_direction_of_no_finite_length_is_tried_once() -> None:
    tried: list[float] = []
    (found,) = extrapolated(of(math.sin, tried), math.nan, 1e-4)
    assert found.isnan().all()
    assert len(tried) == 1
