"""Convolution and BatchNorm of the probes, against torch's own derivatives, or finite differences where it has none."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import flat
from torch import Tensor, nn

from dynamics.curvature import Expansion
from dynamics.higher_order import HigherOrder

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "padded and strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "one stride a side": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1)),
    "dilated": lambda: nn.Conv2d(4, 6, 2, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "same, even": lambda: nn.Conv2d(4, 6, 2, padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3, groups=2)),
    "three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 4, (1, 3, 3))),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
}
NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "one dimension": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(100)),
}


def directions(theta: dict[str, Tensor], count: int) -> list[list[Tensor]]:
    return [[torch.randn_like(tensor) for tensor in theta.values()] for _ in range(count)]


def loss_of(layer: nn.Module, inputs: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """A loss that is curved in the layer's parameters and in those before it."""

    def loss(theta: dict[str, Tensor]) -> Tensor:
        own = {name.removeprefix("layer."): tensor for name, tensor in theta.items() if name.startswith("layer.")}
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        outputs = torch.func.functional_call(layer, own | buffers, (torch.tanh(inputs * theta["before"]),))
        return torch.tanh(outputs).pow(3).mean()

    return loss


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    theta = {f"layer.{name}": torch.randn_like(tensor) for name, tensor in layer.named_parameters()}
    return theta | {"before": torch.rand(4, 1, 1) + 0.5}


def hessian_product(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor], v: list[Tensor]) -> Tensor:
    """Hv by torch's own operations."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
    grad = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    slope = sum((part * one).sum() for part, one in zip(grad, v, strict=True))
    return flat(torch.autograd.grad(slope, list(leaves.values())))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layer, inputs = CONVOLUTIONS[name](), torch.randn(3, 4, 6, 6)
    check(loss_of(layer, inputs), parameters(layer))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, mode: str) -> None:
    layer, inputs = NORMS[name]().train(mode == "train"), torch.randn(6, 4, 5, 5)
    check(loss_of(layer, inputs), parameters(layer))


def check(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor]) -> None:
    """Value, gradient and Hv are those of torch's operations, T[u,v] a central difference of that Hv."""
    expansion, (u, v) = Expansion([loss], [1.0], theta), directions(theta, 2)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    own = loss(leaves)
    torch.testing.assert_close(expansion.loss, own.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(expansion.grad), flat(torch.autograd.grad(own, list(leaves.values()))))
    torch.testing.assert_close(flat(expansion.hessian_product(v)), hessian_product(loss, theta, v))
    ahead, behind = (
        hessian_product(
            loss, {name: tensor + step * one for (name, tensor), one in zip(theta.items(), u, strict=True)}, v
        )
        for step in (1e-5, -1e-5)
    )
    third = flat(expansion.third_products(u, [v])[0])
    difference = (ahead - behind) / 2e-5
    assert (third - difference).norm() < 1e-7 * difference.norm()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_move_as_torchs(momentum: float | None) -> None:
    ours, torchs = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for inputs in torch.randn(3, 6, 4, 5, 5):
        torchs(inputs)
        with HigherOrder():
            ours(inputs)
    for one, other in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_what_torch_refuses_it_goes_on_to_refuse_in_its_own_words() -> None:
    with HigherOrder():
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 4), None, None, training=True)
        with pytest.raises(RuntimeError, match="strided convolutions"):
            F.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), stride=2, padding="same")
        with pytest.raises(RuntimeError, match="scalar type"):
            F.conv2d(torch.randn(1, 2, 4, 4).float(), torch.randn(2, 2, 3, 3))


def test_an_image_without_a_batch_is_torchs() -> None:
    image, weight = torch.randn(2, 4, 4), torch.randn(2, 2, 3, 3)
    with HigherOrder():
        torch.testing.assert_close(F.conv2d(image, weight), F.conv2d(image[None], weight)[0])
