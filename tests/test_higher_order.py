"""Convolution and BatchNorm of the probes, against torch's own derivatives, or finite differences where it has none."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import flat
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode

from dynamics.curvature.expansion import Expansion
from dynamics.curvature.higher_order import HigherOrder

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
    "of normed weights": lambda: weight_norm(nn.Conv2d(4, 6, 3)),
    "of weights normed together": lambda: weight_norm(nn.Conv2d(4, 6, 3), dim=None),
    "of weights normed the older way": lambda: torch.nn.utils.weight_norm(nn.Conv2d(4, 6, 3), dim=1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "transposed, padded, in groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2),
    "a decoder's": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, one dimension": lambda: nn.Sequential(
        nn.Flatten(2), nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2, bias=False)
    ),
    "transposed, three dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.ConvTranspose3d(2, 4, (1, 3, 3), stride=(1, 2, 1), output_padding=(0, 1, 0))
    ),
}
NORMALISATIONS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "one dimension": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(100)),
    "instances": lambda: nn.InstanceNorm2d(4, affine=True),
    "instances, not affine": lambda: nn.InstanceNorm2d(4),
    "layers": lambda: nn.LayerNorm((4, 5, 5)),
    "rows, without a bias": lambda: nn.LayerNorm(5, bias=False),
    "root mean squares": lambda: nn.RMSNorm(5),
    "groups": lambda: nn.GroupNorm(2, 4),
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


def value_and_gradient(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """L and ∇L by torch's own operations, whose first derivatives are right."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
    value = loss(leaves)
    return value.detach(), flat(torch.autograd.grad(value, list(leaves.values())))


def gradient(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor]) -> Tensor:
    return value_and_gradient(loss, theta)[1]


def moved(theta: dict[str, Tensor], direction: list[Tensor], distance: float) -> dict[str, Tensor]:
    return {name: tensor + distance * one for (name, tensor), one in zip(theta.items(), direction, strict=True)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel", "ignore:.*weight_norm")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    layer, inputs = CONVOLUTIONS[name](), torch.randn(3, 4, 6, 6)
    check(loss_of(layer, inputs), parameters(layer))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations(name: str, mode: str) -> None:
    layer, inputs = NORMALISATIONS[name]().train(mode == "train"), torch.randn(6, 4, 5, 5)
    check(loss_of(layer, inputs), parameters(layer))


def test_a_hard_sigmoid() -> None:
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Hardsigmoid(inplace=True))
    check(loss_of(squeeze, torch.randn(3, 4, 6, 6)), parameters(squeeze))


def test_a_backward_pass_that_cannot_be_recorded_has_differences() -> None:
    layer, inputs = nn.CrossMapLRN2d(2, alpha=0.5), torch.randn(3, 4, 6, 6)
    theta = parameters(layer)
    loss, v = loss_of(layer, inputs), directions(theta, 1)[0]
    expansion = Expansion([loss], [1.0], theta)
    assert not expansion.exact
    torch.testing.assert_close(flat(expansion.grad), gradient(loss, theta))
    ahead, behind = (gradient(loss, moved(theta, v, step)) for step in (1e-5, -1e-5))
    assert_near(flat(expansion.hessian_product(v)), (ahead - behind) / 2e-5, 1e-6)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_polynomial_has_the_derivatives_it_has(degree: int) -> None:
    x, u, v = torch.randn(3, 5)
    expansion = Expansion([lambda theta: math.prod([theta["x"]] * degree).sum()], [1.0], {"x": x})
    first, second, third = (math.perm(degree, order) * x ** max(degree - order, 0) for order in (1, 2, 3))
    torch.testing.assert_close(expansion.grad[0], first)
    torch.testing.assert_close(expansion.hessian_product([u])[0], second * u)
    torch.testing.assert_close(expansion.third_products([u], [[v]])[0][0], third * u * v)


class Double(torch.autograd.Function):
    """2x, whose backward pass is ``once_differentiable``."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


class Cube(torch.autograd.Function):
    """x³, whose backward pass has a derivative, but no second one."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x * Double.apply(x) / 2


@pytest.mark.parametrize("of", [lambda x: Double.apply(x) ** 3 / 8, Cube.apply], ids=["second", "third"])
def test_a_third_derivative_that_autograd_lacks_is_no_number(of: Callable[[Tensor], Tensor]) -> None:
    """It would leave out, without a word, what goes through the operation that has none."""
    x, u, v = torch.randn(3, 5)
    expansion = Expansion([lambda theta: of(theta["x"]).sum()], [1.0], {"x": x})
    torch.testing.assert_close(expansion.hessian_product([u])[0], 6 * x * u, rtol=1e-6, atol=1e-6)
    assert expansion.third_products([u], [[v]])[0][0].isnan().all()


def check(loss: Callable[[dict[str, Tensor]], Tensor], theta: dict[str, Tensor]) -> None:
    """Value and gradient are those of torch's operations; Hv and T[u,v] central differences of that gradient."""
    expansion, (u, v) = Expansion([loss], [1.0], theta), directions(theta, 2)
    value, grad = value_and_gradient(loss, theta)
    torch.testing.assert_close(expansion.loss, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(expansion.grad), grad)
    ahead, behind = (gradient(loss, moved(theta, v, step)) for step in (1e-5, -1e-5))
    assert_near(flat(expansion.hessian_product(v)), (ahead - behind) / 2e-5, 1e-7)
    small, corners = 5e-4, [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    second = sum(i * j * gradient(loss, moved(moved(theta, u, i * small), v, j * small)) for i, j in corners)
    assert_near(flat(expansion.third_products(u, [v])[0]), second / (4 * small**2), 1e-4)


def assert_near(ours: Tensor, difference: Tensor, tolerance: float) -> None:
    assert (ours - difference).norm() < tolerance * difference.norm()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_move_as_torchs(momentum: float | None) -> None:
    ours, torchs = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for inputs in torch.randn(3, 6, 4, 5, 5):
        torchs(inputs)
        with HigherOrder():
            ours(inputs)
    for one, other in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_statistics_of_one_network_in_both_modes() -> None:
    norm, inputs = nn.BatchNorm2d(4), torch.randn(6, 4, 5, 5)

    def loss(theta: dict[str, Tensor]) -> Tensor:
        running = norm.running_mean.clone(), norm.running_var.clone()
        own = theta["weight"], theta["bias"]
        evaluated, trained = (F.batch_norm(inputs * theta["before"], *running, *own, mode) for mode in (False, True))
        return (torch.tanh(evaluated) * trained).pow(2).mean()

    theta = {"before": torch.rand(4, 1, 1) + 0.5, "weight": torch.rand(4), "bias": torch.rand(4)}
    gradient, direction = Expansion([loss], [1.0], theta).grad[0], torch.randn(4, 1, 1)
    ahead, behind = (loss(theta | {"before": theta["before"] + step * direction}) for step in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-7, atol=0)


def jacobian_by_batched_gradients(outputs: Tensor, inputs: Tensor) -> Tensor:
    directions = torch.eye(outputs.numel()).view(-1, *outputs.shape)
    return torch.autograd.grad(outputs, inputs, directions, is_grads_batched=True, create_graph=True)[0]


def jacobian_by_mapped_gradients(outputs: Tensor, inputs: Tensor) -> Tensor:
    def row(v: Tensor) -> Tensor:
        return torch.autograd.grad(outputs, inputs, v, create_graph=True)[0]

    return torch.func.vmap(row)(torch.eye(outputs.numel()).view(-1, *outputs.shape))


@pytest.mark.parametrize("jacobian", [jacobian_by_batched_gradients, jacobian_by_mapped_gradients])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_loss_of_a_jacobian(kind: type[nn.Module], jacobian: Callable[[Tensor, Tensor], Tensor]) -> None:
    layer, images = kind(2, 2, 2, stride=2, bias=False), torch.randn(2, 2, 4, 4)

    def loss(theta: dict[str, Tensor]) -> Tensor:
        inputs = torch.tanh(images * theta["before"])
        outputs = torch.tanh(torch.func.functional_call(layer, {"weight": theta["weight"]}, (inputs,)))
        return jacobian(outputs, inputs).pow(2).mean()

    check(loss, {"weight": torch.randn_like(layer.weight), "before": torch.rand(2, 1, 1) + 0.5})


def test_derivatives_that_go_forward_are_torchs() -> None:
    inputs, weight, tangent = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(2, 2, 4, 4)
    with HigherOrder(), forward_ad.dual_level():
        primal, slope = forward_ad.unpack_dual(F.conv2d(forward_ad.make_dual(inputs, tangent), weight))
    torch.testing.assert_close(primal, F.conv2d(inputs, weight))
    torch.testing.assert_close(slope, F.conv2d(tangent, weight))


class Doubled(TorchFunctionMode):
    """The weights of convolutions count twice, as a mode for quantised training would change them."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
        if function is F.conv2d:
            args = (args[0], 2 * args[1], *args[2:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("outside", [True, False])
def test_another_mode_sees_what_it_would_see(outside: bool) -> None:
    inputs, weight = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3)
    modes = [Doubled(), HigherOrder()] if outside else [HigherOrder(), Doubled()]
    with modes[0], modes[1]:
        outputs = F.conv2d(inputs, weight)
    torch.testing.assert_close(outputs, F.conv2d(inputs, 2 * weight))


LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, eval": lambda: nn.BatchNorm2d(4).eval(),
    "instances": lambda: nn.InstanceNorm2d(4, affine=True),
    "rows": lambda: nn.LayerNorm(6),
}
FORMATS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels in between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", LAYERS)
def test_results_lie_in_memory_as_torchs(kind: str, name: str) -> None:
    layer, inputs = LAYERS[kind](), FORMATS[name](torch.randn(3, 4, 5, 6))
    with HigherOrder():
        ours = layer(inputs)
    assert ours.stride() == layer(inputs).stride()


@pytest.mark.parametrize("constant", [0.3, 1000.1])
def test_a_dead_channel_costs_no_digits(constant: float) -> None:
    images, weight, bias, target = (
        torch.randn(16, 3, 4, 4),
        torch.rand(3) + 0.5,
        torch.randn(3),
        torch.randn(16, 3, 4, 4),
    )
    images[:, 1] = constant

    def derivatives(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = images.float().to(kind)

        def loss(theta: dict[str, Tensor]) -> Tensor:
            normed = F.batch_norm(inputs + theta["before"], None, None, theta["weight"], theta["bias"], training=True)
            return (torch.tanh(normed) * target.to(kind)).sum()

        theta = {"before": torch.zeros(3, 1, 1, dtype=kind), "weight": weight.to(kind), "bias": bias.to(kind)}
        expansion = Expansion([loss], [1.0], theta)
        return flat(expansion.grad[1:]), flat(expansion.hessian_product([one.sign() for one in expansion.grad])[1:])

    for ours, truth in zip(derivatives(torch.float32), derivatives(torch.float64), strict=True):
        assert (ours.double() - truth).norm() < 1e-5 * truth.norm()


def images() -> Tensor:
    return torch.linspace(-1, 1, 64).view(2, 2, 4, 4)


def weight() -> Tensor:
    return torch.linspace(-1, 1, 54).view(3, 2, 3, 3)


REFUSED = {
    "one value a channel": lambda: F.batch_norm(torch.randn(1, 4), None, None, training=True),
    "a strided same": lambda: F.conv2d(images(), weight(), stride=2, padding="same"),
    "another type": lambda: F.conv2d(images().float(), weight()),
    "a bias of another type": lambda: F.conv2d(images(), weight(), torch.ones(3).float()),
    "a bias of another size": lambda: F.conv2d(images(), weight(), torch.ones(1)),
    "an unknown padding": lambda: F.conv2d(images(), weight(), padding="foo"),
    "too many dilations": lambda: F.conv2d(images(), weight(), padding="same", dilation=(1, 1, 1)),
    "too many dimensions": lambda: F.conv2d(images()[..., None], weight()[..., None]),
    "too few dimensions": lambda: F.conv1d(images(), weight()),
    "too much output padding": lambda: F.conv_transpose2d(
        images(), torch.randn(2, 3, 3, 3), stride=2, output_padding=2
    ),
    "other channels, transposed": lambda: F.conv_transpose2d(images(), weight()),
    "no statistics": lambda: F.batch_norm(images(), None, None, training=False),
    "one statistic for all": lambda: F.batch_norm(images(), torch.zeros(1), torch.ones(1)),
    "other channels": lambda: F.batch_norm(images(), torch.ones(3), torch.ones(3)),
    "a weight of another size": lambda: F.batch_norm(images(), None, None, torch.ones(1), None, training=True),
    "no epsilon": lambda: F.batch_norm(images(), None, None, training=True, eps=0.0),
    "one value a channel of an instance": lambda: F.instance_norm(torch.randn(3, 4, 1)),
    "an instance of no dimension": lambda: F.instance_norm(torch.randn(3, 4)),
    "a row of another size": lambda: F.layer_norm(images(), (3,)),
    "a shorter weight of a row": lambda: F.layer_norm(images(), (4,), torch.ones(1)),
    "a row of no dimension": lambda: F.layer_norm(torch.tensor(1.0), ()),
    "no channels' dimension": lambda: F.batch_norm(torch.randn(4), None, None, training=True),
}
TAKEN = {
    "an image without a batch": lambda: F.conv2d(images()[0], weight()),
    "an empty batch": lambda: F.conv2d(images()[:0], weight()),
    "a number of numpy's": lambda: F.conv2d(images(), weight(), stride=np.int64(2)),
    "no channels": lambda: F.batch_norm(torch.randn(2, 0, 4), None, None, training=True),
    "a weight in a matrix": lambda: F.batch_norm(images(), torch.ones(2), torch.ones(2), torch.ones(2, 1)),
    "instances with statistics": lambda: F.instance_norm(images(), torch.zeros(2), torch.ones(2)),
    "half precision, whose squares are too large": lambda: F.batch_norm(
        1000 * images().half(), None, None, training=True
    ),
    "rows of half precision, whose squares are too large": lambda: F.layer_norm(1000 * images().half(), (4, 4)),
    "no rows": lambda: F.layer_norm(torch.randn(0, 4), (4,)),
    "no data": lambda: F.conv2d(images().to("meta"), weight().to("meta")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_it_goes_on_to_refuse_in_its_own_words(name: str) -> None:
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - of whatever type torch's is
        REFUSED[name]()
    with HigherOrder(), pytest.raises(torchs.type, match=re.escape(str(torchs.value).splitlines()[0])):
        REFUSED[name]()


@pytest.mark.parametrize("name", TAKEN)
def test_what_torch_takes_it_goes_on_to_take(name: str) -> None:
    with HigherOrder():
        ours = TAKEN[name]()
    torchs = TAKEN[name]()
    assert (ours.shape, ours.device) == (torchs.shape, torchs.device)
    if ours.device.type != "meta":
        torch.testing.assert_close(ours, torchs)
