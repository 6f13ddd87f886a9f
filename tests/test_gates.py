"""Products by gates are those of the dense Hessian, whatever the operations, and form no weight's gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dynamics.curvature.expansion import Expansion
from dynamics.curvature.gated_affine import Affine, inner
from dynamics.curvature.gated_batch_norm import BatchNorm
from dynamics.curvature.gates import gated_products
from dynamics.models import MODELS, build
from dynamics.network.masks import parameter_masks
from dynamics.probing.objective import cross_entropy_objective
from dynamics.probing.probe import Probe
from dynamics.pruning import Pruner

Loss = Callable[[dict[str, Tensor]], Tensor]


def mean_square(output: Tensor) -> Tensor:
    return (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).square().mean() + output.sin().mean()


def loss_of_module(module: nn.Module, *inputs: Tensor, penalty: float = 0.0) -> Loss:
    """L2-penalised loss; buffers are copies, so each evaluation finds them as they were."""

    def loss(theta: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        output = torch.func.functional_call(module, theta | buffers, inputs)
        output = output[0] if isinstance(output, tuple) else output
        return mean_square(output) + penalty * sum(tensor.pow(4).sum() for tensor in theta.values())

    return loss


def dense(loss_of: Loss, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient and dense Hessian on the flattened parameters, column by column.

    Not by torch.func.hessian: its second derivatives by the weight of a normalisation are wrong (torch 2.14, under
    vmap), which shows in that they are not symmetric.
    """
    sizes = [tensor.numel() for tensor in theta.values()]

    def flat_loss(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        return loss_of({name: part.view_as(theta[name]) for name, part in zip(theta, parts, strict=True)})

    flat = torch.cat([tensor.reshape(-1) for tensor in theta.values()])
    hessian = torch.autograd.functional.hessian(flat_loss, flat)
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-11)
    return torch.autograd.functional.jacobian(flat_loss, flat), hessian


def check(loss_of: Loss, theta: dict[str, Tensor], count: int = 2, frozen: tuple[str, ...] = ()) -> None:
    """All three rows against the dense ones, every parameter a layer but the last two, which share theirs."""
    layer_of = {name: min(index, max(len(theta) - 2, 0)) for index, name in enumerate(theta)}
    layers = len(theta)
    directions = [{name: torch.randn_like(tensor) for name, tensor in theta.items()} for _ in range(count)]
    found = gated_products(loss_of, theta, directions, layer_of, layers, frozen=frozen)
    moving = {name: torch.full((tensor.numel(),), float(name not in frozen)) for name, tensor in theta.items()}
    grad, hessian = dense(loss_of, theta)
    for k, direction in enumerate(directions):
        v = torch.cat([direction[name].reshape(-1) * moving[name] for name in theta])
        product = hessian @ v
        of_theta = torch.cat([tensor.reshape(-1) * moving[name] for name, tensor in theta.items()])
        index = torch.cat([torch.full((tensor.numel(),), layer_of[name]) for name, tensor in theta.items()])
        for values, row in ((v * grad, found.slope), (of_theta * product, found.param_hess), (v * product, found.hess)):
            expected = torch.zeros(layers).index_add(0, index, values)
            torch.testing.assert_close(row[k], expected, rtol=1e-10, atol=1e-11 * expected.abs().max().item())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    torch.testing.assert_close(found.loss, loss_of(leaves).detach(), rtol=1e-12, atol=0)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


class Lambda(nn.Module):
    """A module of the given modules whose forward pass is a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(self, *inputs)


def tied() -> nn.Module:
    module = Lambda(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    module.b.weight = module.a.weight
    return module


def normalised(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), norm, nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Softplus())


def pruned() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    prune.random_unstructured(network[0], "weight", 0.5)
    return network


NETWORKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)),
    "no bias": lambda: (nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)),
    "linear, 3-D": lambda: (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(2, 3, 3)),
    "linear, 1-D": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3)),
    "in place": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 2), nn.ELU(inplace=True)),
        torch.randn(5, 3),
    ),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 2, padding="same", dilation=3), nn.Tanh(), nn.Conv1d(3, 2, 3, padding="valid")),
        torch.randn(2, 2, 7),
    ),
    "conv2d": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 2, (2, 1), dilation=(2, 1), padding=(0, 1), padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(2, 2, (2, 3), padding="same"),
        ),
        torch.randn(2, 2, 7, 6),
    ),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 1, 2)), torch.randn(2, 1, 4, 3, 4)),
    "one image": lambda: (nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 1, 2)), torch.randn(1, 4, 4)),
    "channels last": lambda: (
        normalised(nn.BatchNorm2d(3)),
        torch.randn(4, 2, 5, 5).to(memory_format=torch.channels_last),
    ),
    "transposed conv": lambda: (nn.Sequential(nn.ConvTranspose2d(1, 2, 2), nn.Tanh()), torch.randn(2, 1, 3, 3)),
    "BatchNorm": lambda: (normalised(nn.BatchNorm2d(3)), torch.randn(4, 2, 5, 5)),
    "BatchNorm, eval": lambda: (normalised(nn.BatchNorm2d(3)).eval(), torch.randn(4, 2, 5, 5)),
    "BatchNorm, no statistics": lambda: (
        normalised(nn.BatchNorm2d(3, track_running_stats=False)).eval(),
        torch.randn(4, 2, 5, 5),
    ),
    "BatchNorm, not affine": lambda: (normalised(nn.BatchNorm2d(3, affine=False)), torch.randn(4, 2, 5, 5)),
    "BatchNorm1d": lambda: (
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        torch.randn(6, 3),
    ),
    "LayerNorm": lambda: (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()), torch.randn(5, 3)),
    "GroupNorm": lambda: (normalised(nn.GroupNorm(1, 3)), torch.randn(4, 2, 5, 5)),
    "tied": lambda: (tied(), torch.randn(5, 3)),
    "used twice": lambda: (
        Lambda(
            lambda m, x: m.a(torch.tanh(m.a(x))) * m.norm(m.norm(x).exp()), a=nn.Linear(3, 3), norm=nn.BatchNorm1d(3)
        ),
        torch.randn(5, 3),
    ),
    "weight used otherwise": lambda: (
        Lambda(lambda m, x: torch.tanh(m.a(x)) @ m.a.weight.t() + m.a.bias.exp(), a=nn.Linear(3, 3)),
        torch.randn(5, 3),
    ),
    "embedding": lambda: (
        Lambda(
            lambda m, x: F.linear(torch.tanh(m.hidden(m.words(x))), m.words.weight),
            words=nn.Embedding(5, 3),
            hidden=nn.Linear(3, 3),
        ),
        torch.randint(5, (4, 2)),
    ),
    "attention": lambda: (
        Lambda(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        torch.randn(2, 3, 4),
    ),
    "unused": lambda: (
        Lambda(lambda m, x: m.b(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3)),
        torch.randn(5, 3),
    ),
    "pruned by torch": lambda: (pruned(), torch.randn(5, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding=.same:UserWarning")  # torch's, in the dense Hessian
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_products_are_those_of_the_dense_hessian(network: Callable[[], tuple[Any, ...]]) -> None:
    module, *inputs = network()
    check(loss_of_module(module, *inputs), parameters(module))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_directions(count: int) -> None:
    network = normalised(nn.BatchNorm2d(3))
    check(loss_of_module(network, torch.randn(4, 2, 5, 5)), parameters(network), count)


def test_penalty_on_the_weights() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    check(loss_of_module(network, torch.randn(5, 3), penalty=0.1), parameters(network))


@pytest.mark.parametrize(
    "frozen", [("0.weight",), ("0.bias", "2.weight"), ("0.weight", "0.bias", "2.weight", "2.bias")]
)
def test_frozen_parameters_are_constants(frozen: tuple[str, ...]) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    check(loss_of_module(network, torch.randn(5, 3)), parameters(network), frozen=frozen)


def test_masked_parameters_keep_their_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    masks = {name: (torch.rand_like(tensor) > 0.4).double() for name, tensor in parameters(network).items()}
    inside = loss_of_module(network, torch.randn(5, 3))
    applied, apply = [], Affine.apply
    monkeypatch.setattr(Affine, "apply", lambda *inputs: (applied.append(1), apply(*inputs))[1])
    check(lambda theta: inside({name: tensor * masks[name] for name, tensor in theta.items()}), parameters(network))
    assert len(applied) == 2


@pytest.mark.parametrize("moved", [False, True])
def test_what_is_pruned_keeps_its_gates_unless_something_moved_it(monkeypatch: pytest.MonkeyPatch, moved: bool) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    Pruner(network, None, "magnitude", granularity="weight").prune(0.5)
    kept = {name: mask.clone() for name, mask in parameter_masks(network).items()}
    if moved:
        with torch.no_grad():
            network[0].weight += 0.1
    batch, theta = (torch.randn(5, 3), torch.randint(2, (5,))), parameters(network)
    probe = Probe(network, cross_entropy_objective, [batch])
    loss, grad = probe.gradient(theta)
    applied, apply = [], Affine.apply
    monkeypatch.setattr(Affine, "apply", lambda *inputs: (applied.append(1), apply(*inputs))[1])
    found = probe.products(theta, [grad], dict.fromkeys(theta, 0), 1)
    assert len(applied) == 2 - moved
    assert loss == found.loss == cross_entropy_objective(network, batch)
    assert not any((grad[name] * ~mask).any() for name, mask in kept.items())
    curved = probe.expand(theta).hessian_product(list(grad.values()))
    product = sum((one * grad[name]).sum() for name, one in zip(theta, curved, strict=True))
    torch.testing.assert_close(found.hess[0, 0], product)


def test_the_weight_norm_whose_own_second_derivative_is_wrong() -> None:
    x, v, g = torch.randn(4, 3), torch.randn(2, 3), torch.rand(2, 1) + 0.5

    def loss_of(weight: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        return lambda theta: mean_square(F.linear(x, weight(theta["v"], theta["g"])))

    by_hand, torchs = loss_of(lambda v, g: v * g / v.norm(dim=1, keepdim=True)), loss_of(torch._weight_norm)
    theta, directions = {"v": v, "g": g}, [{"v": torch.randn_like(v), "g": torch.randn_like(g)}]
    check(by_hand, theta)
    found = (gated_products(loss, theta, directions, {"v": 0, "g": 1}, 2) for loss in (by_hand, torchs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_hard_sigmoid_of_which_torch_has_one_derivative(inplace: bool) -> None:
    x, weight = 3 * torch.randn(6, 3), torch.randn(4, 3)

    def loss_of(function: Callable[[Tensor], Tensor]) -> Loss:
        return lambda theta: mean_square(function(F.linear(x, theta["weight"]).tanh() * 4))

    by_hand, torchs = loss_of(lambda y: F.relu6(y + 3) / 6), loss_of(lambda y: F.hardsigmoid(y, inplace=inplace))
    check(by_hand, {"weight": weight})
    found = (gated_products(loss, {"weight": weight}, [{"weight": weight}], {"weight": 0}, 1)
             for loss in (by_hand, torchs))  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_weight_times_a_variable_is_no_gated_parameter() -> None:
    theta = {"scale": torch.randn(2, 3), "weight": torch.randn(2, 3)}
    x = torch.randn(4, 3)
    check(lambda theta: mean_square(F.linear(x, theta["weight"] * theta["scale"])), theta)


def slope_by_input(module: nn.Module, x: Tensor) -> Loss:
    def loss(theta: dict[str, Tensor]) -> Tensor:
        point = x.clone().requires_grad_()
        output = torch.func.functional_call(module, theta, (point,))
        (slope,) = torch.autograd.grad(mean_square(output), point, create_graph=True)
        return slope.square().sum() + output.mean()

    return loss


def loss_after_a_step(module: nn.Module, x: Tensor) -> Loss:
    inside = loss_of_module(module, x)

    def loss(theta: dict[str, Tensor]) -> Tensor:
        slopes = torch.autograd.grad(inside(theta), list(theta.values()), create_graph=True)
        return inside({name: tensor - slope for (name, tensor), slope in zip(theta.items(), slopes, strict=True)})

    return loss


@pytest.mark.parametrize("loss", [slope_by_input, loss_after_a_step])
def test_a_loss_may_take_gradients_itself(loss: Callable[[nn.Module, Tensor], Loss]) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    check(loss(module, torch.randn(5, 3)), parameters(module))


def test_a_gradient_penalty_through_a_layer_norm_whose_own_third_derivative_is_wrong() -> None:
    def root(y: Tensor) -> Tensor:
        y = y - y.mean(-1, keepdim=True)
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    by_hand, torchs = (
        Lambda(lambda m, x, norm=norm: m.b(norm(torch.tanh(m.a(x)))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
        for norm in (root, lambda y: F.layer_norm(y, (4,)))
    )
    x, theta = torch.randn(5, 3), parameters(by_hand)
    check(slope_by_input(by_hand, x), theta)
    directions, layer_of = [{name: torch.randn_like(tensor) for name, tensor in theta.items()}], dict.fromkeys(theta, 0)
    found = (gated_products(slope_by_input(m, x), theta, directions, layer_of, 1) for m in (by_hand, torchs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_theta_stays_where_an_operation_changes_its_parameter() -> None:
    words = nn.Embedding(5, 3, max_norm=0.1)
    theta = parameters(words)
    before = theta["weight"].clone()
    loss_of = loss_of_module(words, torch.tensor([1, 3]))
    gated_products(loss_of, theta, [theta], {"weight": 0}, 1)
    assert torch.equal(theta["weight"], before)


def test_a_transformed_loss_is_torchs_own() -> None:
    network, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)

    def loss_of(theta: dict[str, Tensor]) -> Tensor:
        one = lambda row: torch.func.functional_call(network, theta, (row,))  # noqa: E731
        return mean_square(torch.func.vmap(one)(x)) + torch.func.vmap(torch.func.jacrev(one))(x).square().sum()

    check(loss_of, parameters(network))


def test_a_layer_without_parameters_in_the_loss_is_zero() -> None:
    found = gated_products(
        lambda theta: theta["a"].square().sum(), {"a": torch.ones(2)}, [[torch.ones(2)]], {"a": 1}, 3
    )
    assert found.hess.tolist() == [[0, 4, 0]]
    constant = gated_products(lambda theta: torch.tensor(1.0), {"a": torch.ones(2)}, [[torch.ones(2)]], {"a": 0}, 1)
    assert constant.slope.tolist() == constant.hess.tolist() == [[0]]
    plane = gated_products(lambda theta: theta["a"].sum(), {"a": torch.ones(2)}, [[torch.ones(2)]], {"a": 0}, 1)
    assert plane.slope.tolist() == [[2]]
    assert plane.hess.tolist() == [[0]]


def test_an_operation_without_second_derivative_is_an_error() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, d: Tensor) -> Tensor:
            return 2 * d * ctx.saved_tensors[0]

    with pytest.raises(RuntimeError, match="once_differentiable"):
        gated_products(
            lambda theta: Once.apply(theta["a"] + 1).sin().sum(), {"a": torch.ones(2)}, [[torch.ones(2)]], {"a": 0}, 1
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_single_precision_and_autocast(autocast: bool) -> None:
    network, x = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)), torch.randn(50, 30)
    theta = parameters(network)
    v = {name: torch.randn_like(tensor) for name, tensor in theta.items()}
    exact = gated_products(loss_of_module(network, x), theta, [v], dict.fromkeys(theta, 0), 1)
    single, inside = {name: tensor.float() for name, tensor in theta.items()}, loss_of_module(network, x.float())

    def loss_of(theta: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return inside(theta)

    found = gated_products(loss_of, single, [{name: one.float() for name, one in v.items()}], dict.fromkeys(v, 0), 1)
    tolerance = {"rtol": 0.05 if autocast else 1e-5, "atol": 0, "check_dtype": False}
    torch.testing.assert_close(found.hess, exact.hess, **tolerance)


@pytest.mark.parametrize("name", [*MODELS, "resnet18"])
def test_products_are_those_of_double_backward(name: str) -> None:
    import torchvision

    network = (
        torchvision.models.resnet18(num_classes=5) if name == "resnet18" else build(name, num_classes=5, width=0.25)
    )
    x, labels, theta = torch.randn(4, 3, 32, 32), torch.randint(5, (4,)), parameters(network)

    def loss_of(theta: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return F.cross_entropy(torch.func.functional_call(network, theta | buffers, (x,)), labels)

    expansion = Expansion([loss_of], [1.0], theta)
    product = expansion.hessian_product(expansion.grad)
    layer_of = {name: index for index, name in enumerate(theta)}
    found = gated_products(loss_of, theta, [expansion.grad], layer_of, len(theta))
    dots = lambda left, right: torch.stack([(p * q).sum() for p, q in zip(left, right, strict=True)])  # noqa: E731
    for row, expected in (
        (found.slope, dots(expansion.grad, expansion.grad)),
        (found.param_hess, dots(theta.values(), product)),
        (found.hess, dots(expansion.grad, product)),
    ):
        torch.testing.assert_close(row[0], expected, rtol=1e-9, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2, 3), (2, 3, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(shape: tuple[int, ...], affine: bool) -> None:
    x = (3 + torch.randn(shape)).requires_grad_()
    weight, bias = (torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)) if affine else (None, None)
    variables = [x, weight, bias] if affine else [x]

    def own(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return BatchNorm.apply(x, weight, bias, (None, None), 0.1, 1e-2)

    assert torch.autograd.gradcheck(own, variables)
    assert torch.autograd.gradgradcheck(own, variables)
    running, expected = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    y = BatchNorm.apply(x, weight, bias, tuple(running), 0.3, 1e-5)
    assert torch.equal(y, F.batch_norm(x, *expected, weight, bias, True, 0.3, 1e-5))
    assert all(map(torch.equal, running, expected))


@pytest.mark.parametrize("count", [1, 2])
def test_no_gradient_is_shaped_like_a_weight(count: int) -> None:
    network, x = nn.Sequential(nn.Linear(67, 71), nn.Tanh(), nn.Linear(71, 73)), torch.randn(5, 67)
    theta, shapes = parameters(network), []

    class Matrices(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                shapes.append(set(result.shape))
            return result

    directions = [[torch.randn_like(tensor) for tensor in theta.values()] for _ in range(count)]
    with Matrices():
        gated_products(loss_of_module(network, x), theta, directions, dict.fromkeys(theta, 0), 1)
    assert len(shapes) == (2 + 4 * count) + (1 + 2 * count)  # the first layer has neither Wᵀδ, Vᵀδ nor Wu, but Wx again
    assert {67, 71} not in shapes
    assert {71, 73} not in shapes


def graph_size() -> int:
    """Tensors that have a history, and the nodes of these histories that are Python's."""
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor | BackwardCFunction)]
    return sum(not isinstance(item, Tensor) or item.grad_fn is not None for item in found)


def test_nothing_of_the_graph_is_left() -> None:
    network, sizes = normalised(nn.BatchNorm2d(3)), []
    inside, theta = loss_of_module(network, torch.randn(4, 2, 5, 5)), parameters(network)
    before = {name: tensor.clone() for name, tensor in theta.items()}

    def loss_of(theta: dict[str, Tensor]) -> Tensor:
        loss = inside(theta)
        sizes.append(graph_size())
        return loss

    gc.collect()
    gc.disable()
    try:
        start = graph_size()
        found = gated_products(loss_of, theta, [theta, theta], dict.fromkeys(theta, 0), 1)
        assert sizes[0] > start == graph_size()
    finally:
        gc.enable()
    assert not any(tensor.requires_grad for tensor in found)
    assert all(torch.equal(theta[name], before[name]) for name in theta)


def test_checkpointed_parts_are_torchs_own() -> None:
    parts = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module = Lambda(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=parts, b=nn.Linear(3, 2))
    check(loss_of_module(module, torch.randn(3, 3)), parameters(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_inner_products_are_accurate(dtype: torch.dtype) -> None:
    p, q = torch.rand(3, 700, 700).to(dtype).transpose(0, 2), torch.rand(3, 700, 700).to(dtype).permute(1, 2, 0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    torch.testing.assert_close(
        inner(p, q[:, :, :3].permute(0, 1, 2)), (p.to(wide).conj() * q.to(wide)).sum().real, rtol=1e-6, atol=0
    )
