"""Exactly as many filters go as asked, the lowest first, and what is gone stays at exactly zero."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynamics.models import ResNet, build
from dynamics.pruning import Pruner, share_left
from dynamics.pruning.units import unit_layers

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vgg13": lambda: build("vgg13", num_classes=4, in_channels=1, width=0.08),
    "mobilenet_v1": lambda: build("mobilenet_v1", num_classes=4, in_channels=1, width=0.08),
    "resnet": lambda: ResNet(8, (4, 6, 8), num_classes=4, in_channels=1),
}
OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda theta: torch.optim.SGD(theta, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda theta: torch.optim.SGD(theta, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda theta: torch.optim.Adam(theta, 0.01, weight_decay=1e-2),
    "adamw": lambda theta: torch.optim.AdamW(theta, 0.01),
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 32, 32, generator=generator, dtype=torch.float64), torch.arange(8) % 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        inputs, labels = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def removed(model: nn.Module, pruner: Pruner) -> dict[str, Tensor]:
    """The entries of each parameter that went with a filter."""
    gone = {}
    for layer in unit_layers(model):
        for name in layer.parameter_names(model):
            gone[name] = model.get_parameter(name)[~pruner.alive[layer.name]]
    return gone


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_pruned_filters_stay_at_exactly_zero(name: str, optimizer_name: str) -> None:
    model = MODELS[name]()
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    train(model, optimizer, 3)
    pruner = Pruner(model, optimizer, "gradient_norm_increase")
    for sparsity in (0.3, 0.5):
        pruner.prune(sparsity, [batch(100)])
        train(model, optimizer, 3)
        gone = removed(model, pruner)
        assert sum(len(part) for part in gone.values()) > 0
        assert all((part == 0).all() for part in gone.values())
    assert all((parameter.grad != 0).any() for parameter in model.parameters())
    for layer in unit_layers(model):
        grads = [model.get_parameter(part).grad for part in layer.parameter_names(model)]
        assert all((grad[~pruner.alive[layer.name]] == 0).all() for grad in grads)


@pytest.mark.parametrize("name", MODELS)
def test_a_silenced_filter_puts_out_nothing(name: str) -> None:
    model = MODELS[name]()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    pruner = Pruner(model, optimizer, "magnitude")
    pruner.prune(0.5)
    train(model, optimizer, 2)
    outputs = {}
    for layer in unit_layers(model):
        last = model.get_submodule(layer.modules[-1])
        last.register_forward_hook(lambda module, inputs, output, key=layer.name: outputs.update({key: output}))
    for mode in (True, False):
        model.train(mode)(batch(0)[0])
        for key, output in outputs.items():
            assert (output[:, ~pruner.alive[key]] == 0).all()
            assert (output[:, pruner.alive[key]] != 0).any()


def test_the_state_of_what_remains_is_kept() -> None:
    model = MODELS["vgg13"]()
    optimizer = OPTIMIZERS["adam"](list(model.parameters()))
    train(model, optimizer, 3)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    pruner = Pruner(model, optimizer, "magnitude")
    pruner.prune(0.5)
    for layer in unit_layers(model):
        alive = pruner.alive[layer.name]
        for name in layer.parameter_names(model):
            after = optimizer.state[model.get_parameter(name)]["exp_avg"]
            assert torch.equal(after[alive], before[name][alive])
            assert (after[~alive] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_exactly_as_many_go_as_asked_and_none_comes_back(name: str) -> None:
    model = MODELS[name]()
    pruner = Pruner(model, OPTIMIZERS["sgd"](list(model.parameters())), "gradient_norm_increase")
    total = sum(layer.filters for layer in unit_layers(model))
    gone = {layer: torch.zeros_like(alive) for layer, alive in pruner.alive.items()}
    for number in range(1, 5):
        sparsity = 1 - share_left(0.6, 4, number)
        pruned = pruner.prune(sparsity, [batch(number)])
        left = sum(int(alive.sum()) for alive in pruned.alive.values())
        assert left == round(total * (1 - sparsity))
        assert pruned.sparsity == pytest.approx(1 - left / total)
        for layer, alive in pruned.alive.items():
            assert not (gone[layer] & alive).any()
            gone[layer] = ~alive
    if name == "resnet":
        assert pruner.alive["stem"].all()


def two_layers(first: list[float], second: list[float]) -> nn.Sequential:
    """Two 1 × 1 convolutions whose filters have the given magnitudes."""
    model = nn.Sequential(nn.Conv2d(1, len(first), 1, bias=False), nn.Conv2d(len(first), len(second), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first).view(-1, 1, 1, 1))
        model[1].weight.zero_()
        model[1].weight[:, 0, 0, 0] = torch.tensor(second)
    return model


def prune_by_magnitude(model: nn.Module, sparsity: float, floor: float) -> dict[str, list[bool]]:
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", floor=floor)
    return {layer: alive.tolist() for layer, alive in pruner.prune(sparsity).alive.items()}


def test_one_ranking_across_layers() -> None:
    alive = prune_by_magnitude(two_layers([4.0, 1.0, 6.0], [2.0, 3.0, 5.0]), 0.5, 0.05)
    assert alive == {"0": [True, False, True], "1": [False, False, True]}


def test_ties_go_by_layer_and_index() -> None:
    assert prune_by_magnitude(two_layers([1.0] * 3, [1.0] * 3), 1 / 3, 0.05) == {
        "0": [False, False, True],
        "1": [True, True, True],
    }


def test_the_floor_keeps_the_best_of_a_layer() -> None:
    alive = prune_by_magnitude(two_layers([0.1, 0.3, 0.2, 0.4], [5.0, 6.0, 7.0, 8.0]), 0.5, 0.5)
    assert alive == {"0": [False, True, False, True], "1": [False, False, True, True]}


def test_what_cannot_be_is_refused_and_the_model_left_alone() -> None:
    model = two_layers([1.0, 2.0], [3.0, 4.0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude")
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
            pruner.prune(sparsity)
    with pytest.raises(ValueError, match="asks for 3 units more to go, but only 2 can"):
        pruner.prune(0.75)
    with pytest.raises(ValueError, match="floor must be in"):
        Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", floor=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [name for name, _ in model.named_buffers()]
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores that are not finite in layer '1'"):
        pruner.prune(0.25)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("rounds", [1, 5, 25])
def test_rounds_follow_the_protocol(sparsity: float, rounds: int) -> None:
    left = 1.0
    for number in range(1, rounds + 1):
        left *= 1 - sparsity / (number * sparsity + rounds * (1 - sparsity))  # r_k of the current filters
        assert share_left(sparsity, rounds, number) == pytest.approx(left, rel=1e-12)
    assert left == pytest.approx(1 - sparsity)
    compressions = [1 / share_left(sparsity, rounds, number) for number in range(rounds + 1)]
    steps = [later - earlier for earlier, later in itertools.pairwise(compressions)]
    assert steps == pytest.approx([steps[0]] * rounds)


@pytest.mark.parametrize(
    ("name", "layer", "modules"),
    [
        ("vgg13", "features.3", ("features.3", "features.5")),
        ("mobilenet_v1", "stem", ("stem", "norm", "blocks.0.depthwise", "blocks.0.norm1")),
        ("resnet", "blocks.1.conv2", ("blocks.1.conv2", "blocks.1.norm2")),
        ("resnet", "blocks.1.shortcut.0", ("blocks.1.shortcut.0", "blocks.1.shortcut.1")),
    ],
)
def test_what_goes_with_a_filter(name: str, layer: str, modules: tuple[str, ...]) -> None:
    found = {unit.name: unit.modules for unit in unit_layers(MODELS[name]())}
    assert found[layer] == modules
