"""Anyone's network: what can be pruned is silent at once and for good, and what cannot is refused by name."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dynamics.network.masks import parameter_masks
from dynamics.pruning import Pruner, scores, shrink
from dynamics.pruning.candidates.units import unit_layers

LONG = pytest.param("alexnet", marks=pytest.mark.long)
TORCHVISION = ["resnet18", LONG, "mobilenet_v2", "squeezenet1_0", "densenet121", "shufflenet_v2_x0_5"]


def data(size: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 3, size, size), torch.tensor([0, 1]))]


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_pruned(name: str) -> None:
    """Exactly as many filters go as asked, and nothing comes out where the last of what goes with them is, ever."""
    model = getattr(torchvision.models, name)(num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-2)
    pruner = Pruner(model, optimizer, "taylor")
    total = sum(len(kept) for kept in pruner.alive.values())
    alive = pruner.prune(0.3, data(64)).alive
    assert sum(int(kept.sum()) for kept in alive.values()) == round(0.7 * total)
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(layer.modules[-1]).register_forward_hook(
            lambda module, inputs, output, name=layer.name: outputs.update({name: output.detach().clone()})
        )
        for layer in unit_layers(model)
    ]
    inputs, labels = data(64)[0]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(inputs), labels).backward()
        optimizer.step()
    model.eval()(inputs)
    for layer, output in outputs.items():
        assert (output[:, ~alive[layer]] == 0).all()
    for hook in hooks:
        hook.remove()


def test_the_classes_of_a_convolutional_head_never_go() -> None:
    model = torchvision.models.squeezenet1_0(num_classes=5)
    with torch.no_grad():
        model.classifier[1].weight.mul_(1e-6)
    alive = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude").prune(0.5).alive
    assert alive["classifier.1"].all()


class Cosine(nn.Linear):
    """A classifier with a forward pass of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.weight.dtype)
        return 5 * F.linear(F.normalize(inputs), F.normalize(self.weight))


class Projected(nn.Module):
    """A classifier that is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(inputs) @ F.normalize(self.matrix, dim=0)


@pytest.mark.parametrize("head", [lambda: Cosine(6, 3), Projected], ids=["a function", "a matrix"])
def test_what_a_classifier_of_its_own_code_reads_may_go(head: Callable[[], nn.Module]) -> None:
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *pooled, nn.Linear(8, 6), nn.ReLU(), head())
    alive = Pruner(model, None, "magnitude").prune(0.5).alive
    assert {name: len(kept) for name, kept in alive.items()} == {"0": 8, "4": 6}
    convolutional = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), *pooled, head())
    assert Pruner(convolutional, None, "magnitude").prune(0.5).alive["0"].sum() == 3


class Fixed(nn.Module):
    """Two layers, and a fixed operation that mixes pixels or nodes of the second's channels."""

    def __init__(self, layer: nn.Module, operation: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.first, self.second = layer, copy.deepcopy(layer)
        self.register_buffer("fixed", torch.rand(shape))
        self.operation = operation

    def forward(self, inputs: Tensor) -> Tensor:
        return self.operation(self.second(torch.relu(self.first(inputs))), self.fixed)


FIXED: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "neighbours": (nn.Linear(4, 4), lambda x, fixed: fixed @ x, (5, 5)),
    "blur": (nn.Conv2d(4, 4, 1), lambda x, fixed: F.conv2d(x, fixed, groups=4), (4, 1, 3, 3)),
    "upsampled": (nn.Conv2d(4, 4, 1), lambda x, fixed: F.conv_transpose2d(x, fixed, None, 2, 0, 0, 4), (4, 1, 2, 2)),
    "resized": (nn.Conv2d(4, 4, 1), lambda x, fixed: fixed @ x @ fixed.t(), (8, 8)),
    "resized in one direction": (nn.Conv2d(4, 4, 1), F.linear, (6, 8)),
}


@pytest.mark.parametrize("case", FIXED)
def test_the_outputs_never_go_where_a_fixed_operation_mixes_no_channels(case: str) -> None:
    layer, operation, shape = FIXED[case]
    model = Fixed(layer, operation, *shape)
    Pruner(model, None, "magnitude").prune(0.3)
    assert set(parameter_masks(model)) == {"first.weight", "first.bias"}


def test_hidden_neurons_are_filters_and_the_classes_are_not() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    one = [(torch.randn(7, 4), torch.arange(7) % 3)]
    found = scores(model, one, "fisher", temperature=2.0)
    assert {layer: len(values) for layer, values in found.items()} == {"0": 6, "3": 5}
    expected = torch.zeros(5)
    for sample, label in zip(one[0][0], one[0][1], strict=True):
        loss = F.cross_entropy(model.eval()(sample[None]) / 2, label[None])
        (grad,) = torch.autograd.grad(loss, [model[3].weight])
        expected += (grad * model[3].weight.detach()).sum(1).square() / 14
    torch.testing.assert_close(found["3"], expected, rtol=1e-10, atol=1e-15)
    pruner = Pruner(model.train(), torch.optim.SGD(model.parameters(), 0.1), "taylor")
    alive = pruner.prune(0.5, one).alive
    assert set(parameter_masks(model)) == {f"{module}.{leaf}" for module in "013" for leaf in ("weight", "bias")}
    hidden = model[:3](one[0][0])
    assert (hidden[:, ~alive["0"]] == 0).all()


class Branching(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.convolution(inputs) if inputs.sum() > 0 else inputs


class OneNorm(nn.Module):
    """Two convolutions through the same BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.first(inputs)) * self.norm(self.second(inputs))).mean((2, 3))


class RunAgain(nn.Module):
    """A layer's channels run through a module, and so does the sum of them and of what another layer makes of them."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.shared = shared

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.shared(self.first(inputs))
        return self.head(self.shared(hidden + self.second(hidden)).mean((2, 3)))


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(256, 2))


def tied() -> nn.Sequential:
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[2].weight = model[1].weight
    return model


class Standardised(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.conv2d(inputs, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Autoencoder(nn.Module):
    """The weight of its encoder is the decoder's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.encoder(inputs)), self.encoder.weight.t()))


class Then(nn.Module):
    """Part of a chain that is a function."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs, *self.parts)


def of_channels_last(inputs: Tensor, norm: nn.Module) -> Tensor:
    return norm(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gated(inputs: Tensor) -> Tensor:
    values, gates = inputs.chunk(2, 1)
    return torch.cat([values * gates.sigmoid()] * 2, 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "untraceable": (Branching, r"Branching cannot be traced by torch\.fx"),
    "grouped": (lambda: chain(nn.Conv2d(4, 4, 1, groups=2)), r"layer '1' has 2 groups: only plain and depthwise"),
    "transposed": (lambda: chain(nn.ConvTranspose2d(4, 4, 1)), "layer '1' is a transposed convolution"),
    "sigmoid": (lambda: chain(nn.Sigmoid()), r"layer '0' feeds into '1' \(Sigmoid\), through which a silenced"),
    "RMS norm": (lambda: chain(nn.RMSNorm(4)), r"layer '0' feeds into '1' \(RMSNorm\), .* may still have an effect"),
    "group norm": (lambda: chain(nn.GroupNorm(2, 4)), r"layer '0' feeds into '1' \(GroupNorm\)"),
    "channels are normalised where they are last": (
        lambda: chain(Then(of_channels_last, nn.LayerNorm(4))),
        r"^layer '0' feeds into '1\.parts\.0' \(LayerNorm\), through which a silenced filter may still have an effect",
    ),
    "sigmoid of channels that are last": (
        lambda: chain(Then(lambda x: torch.transpose(x, 1, 2).sigmoid())),
        "^layer '0' feeds into 'sigmoid', through which",
    ),
    "gates are half of the channels": (lambda: chain(Then(gated)), "^layer '0' feeds into 'sigmoid', through"),
    "gated linear unit": (lambda: chain(nn.GLU(1), nn.Conv2d(2, 4, 1)), r"^layer '0' feeds into '1' \(GLU\), through"),
    "no γ and β": (lambda: chain(nn.BatchNorm2d(4, affine=False)), "layer '0' feeds into '1', which has no γ and β"),
    "one norm for two": (
        OneNorm,
        "layer 'first' feeds into 'norm', and so do other channels; layer 'second' feeds into",
    ),
    "a norm again after a sum": (
        lambda: RunAgain(nn.BatchNorm2d(4)),
        "layer 'first' feeds into 'shared', and so do other channels; to leave",
    ),
    "depthwise again after a sum": (
        lambda: RunAgain(nn.Conv2d(4, 4, 1, groups=4)),
        "layer 'first' feeds into 'shared', and so do other channels; to",
    ),
    "tied": (tied, "layer '1' shares its weight with '2'"),
    "tied by its code": (Autoencoder, "^layer 'encoder' has a weight that the model's own code uses: what goes"),
    "of its own code": (lambda: chain(Standardised(4, 4, 1)), "^layer '1' has a weight that the model's own code uses"),
    "parametrized": (
        lambda: chain(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))),
        "layer '1' has a weight that is computed from others",
    ),
    "nothing to prune": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "no convolution or hidden linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_safely_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    before = copy.deepcopy(dict(model.state_dict()))
    for prune in (
        lambda: Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude"),
        lambda: scores(model, None, "magnitude"),
    ):
        with pytest.raises(ValueError, match=message):
            prune()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_refused_layer_may_be_left_as_it_is() -> None:
    model = torchvision.models.mobilenet_v3_small(num_classes=5)
    with pytest.raises(ValueError, match=r"features\.1\.block\.1\.fc2.*name it in protected="):
        unit_layers(model)
    gates = [name for name, _ in model.named_modules() if name.endswith("fc2")]
    alive = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", protected=gates).prune(0.4).alive
    assert not set(gates) & alive.keys()
    assert sum(int(kept.sum()) for kept in alive.values()) == round(0.6 * sum(map(len, alive.values())))


def test_what_shares_a_normalisation_with_a_layer_that_is_left_as_it_is_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"^layer 'first' feeds into 'norm', and so do other channels; to leave it as"):
        unit_layers(OneNorm(), protected=["second"])
    assert [layer.name for layer in unit_layers(OneNorm(), protected=["first", "second"])] == ["head"]


def test_layers_inside_a_module_that_tracing_does_not_open_are_no_filters_unseen() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.Sequential(
        OrderedDict(inp=nn.Linear(8, 16), encoder=encoder, hidden=nn.Linear(16, 6), out=nn.Linear(6, 3))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"does not look into 'encoder' \(TransformerEncoder\).*protected="):
        Pruner(model, optimizer, "magnitude")
    assert Pruner(model, optimizer, "magnitude", protected=["encoder"]).alive.keys() == {"inp", "hidden"}
    weights = Pruner(model, optimizer, "magnitude", granularity="weight", protected=["encoder"])
    assert weights.alive.keys() == {"inp", "hidden", "out"}


class Initialised(nn.Conv2d):
    """A convolution that differs from torch's in how it begins."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.constant_(self.bias, 0.5)


class Gentle(nn.BatchNorm2d):
    """A normalisation with another momentum."""

    def __init__(self, count: int) -> None:
        super().__init__(count, momentum=0.01)


def test_a_layer_that_inherits_torch_s_forward_pass_is_as_torch_s() -> None:
    between, end = (nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU()), (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(Initialised(3, 6, 3), Gentle(6), *between, *end)
    first, second = unit_layers(model)
    assert (first.modules, first.readers, second.modules) == (("0", "1"), ("3",), ("3",))


class Activated(nn.BatchNorm2d):
    """A normalisation with a forward pass of its own, which ends in an activation, as timm's has it."""

    def __init__(self, count: int, *, of_all: bool = False) -> None:
        super().__init__(count)
        self.activation, self.of_all = nn.SiLU(), of_all

    def forward(self, inputs: Tensor) -> Tensor:
        trains = self.training or self.running_mean is None
        statistics = self.running_mean, self.running_var
        normalised = F.batch_norm(inputs, *statistics, self.weight, self.bias, trains, self.momentum, self.eps)
        return self.activation(normalised) + (normalised.sigmoid() if self.of_all else 0)


def test_a_normalisation_of_its_own_code_goes_with_the_filters_whose_channels_it_normalises() -> None:
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Activated(6), nn.Conv2d(6, 4, 1, bias=False), Activated(4), *end)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train = [(torch.randn(5, 3, 8, 8), torch.arange(5) % 2) for _ in range(3)]
    assert [layer.modules for layer in unit_layers(model)] == [("0", "1"), ("2", "3")]

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for inputs, labels in train:
            optimizer.zero_grad()
            loss = F.cross_entropy(model.train()(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    trained(model, optimizer)
    pruned = Pruner(model, optimizer, "taylor").prune(0.4, train)
    seen = []
    for layer in ("1", "3"):
        model.get_submodule(layer).register_forward_hook(lambda _, inputs, output: seen.append(output))
    trained(model, optimizer)
    for output, gone in zip(seen[-2:], (~pruned.alive["0"], ~pruned.alive["2"]), strict=True):
        assert gone.any()
        assert (output[:, gone] == 0).all()
    masked = copy.deepcopy((model, optimizer))
    shrunk = shrink(model, optimizer, inputs=train[0][0])
    assert sum(map(len, shrunk.units.values())) == 6 + 2  # and the classes
    np.testing.assert_allclose(trained(model, optimizer), trained(*masked), rtol=1e-10)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
def test_a_normalisation_of_a_part_of_the_pixels_goes_with_no_filter(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Then(lambda x: x[:, :, 1:]), norm(4), nn.Conv2d(4, 2, 1), nn.Flatten())
    assert unit_layers(model)[0].modules == ("0",)


def test_a_normalisation_of_its_own_code_lifts_what_it_lifts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Activated(6, of_all=True), nn.Conv2d(6, 4, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '0' feeds into 'sigmoid', through which a silenced filter may"):
        unit_layers(model)


def test_a_convolution_called_twice_goes_with_all_that_follows_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.one, self.two = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head((self.one(self.shared(inputs)) + self.two(self.shared(-inputs))).mean((2, 3)))

    (layer,) = unit_layers(Twice())
    assert layer.modules == ("shared", "one", "two")
    assert layer.summed


class Separable(nn.Module):
    """A depthwise convolution that reads what ``between`` makes of normalised channels."""

    def __init__(self, between: Callable[[Tensor], Tensor], count: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, count, 1), nn.BatchNorm2d(count)
        self.depthwise, self.after = nn.Conv2d(count, count, 3, groups=count, padding=1), nn.BatchNorm2d(count)
        self.last, self.head = nn.Conv2d(count, 4, 1), nn.Linear(4, 2)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.after(self.depthwise(self.between(self.norm(self.first(inputs)))))
        return self.head(F.relu(self.last(F.relu(hidden))).mean((2, 3)))


ZERO_STAYS_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "padded by zeros": lambda x: F.pad(F.relu(x), (0, 1, 0, 1)),
    "padded by its own": lambda x: F.pad(x, [1, 1, 1, 1], mode="reflect"),
    "a reflecting layer": nn.ReflectionPad2d(1),
    "a layer of zeros": nn.ConstantPad2d(1, 0.0),
    "hard swish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "a multiple": lambda x: torch.div(-0.5 * x, 3),
    "ReLU6 by hand": lambda x: x.clamp(0, 6),
    "ReLU by hand": lambda x: torch.clamp(x, min=0),
    "gated by others": lambda x: x * x.mean((2, 3), keepdim=True),
    "another type": lambda x: x.double(),
    "a function": lambda x: F.celu(F.dropout3d(x.abs())),
    "Python's own functions": lambda x: abs(-x),
    "squared ReLU": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("case", ZERO_STAYS_ZERO)
def test_a_depthwise_filter_goes_with_its_channel_through_all_that_leaves_zero_zero(case: str) -> None:
    model, inputs = Separable(ZERO_STAYS_ZERO[case]), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    outputs: list[Tensor] = []
    model.after.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))

    def step() -> None:
        F.cross_entropy(model(inputs), torch.arange(4) % 2).backward()
        optimizer.step()

    step()
    gone = ~Pruner(model, optimizer, "magnitude").prune(0.4).alive["first"]
    step()
    model.eval()(inputs)
    assert gone.any()
    assert (outputs[-1][:, gone] == 0).all()
    assert (outputs[-1][:, ~gone] != 0).any()


class Product(nn.Module):
    """Two convolutions whose product is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.last, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        product = self.norm(self.first(inputs) * torch.tanh(self.second(inputs)))
        return self.head(F.relu(self.last(product)).mean((2, 3)))


def test_a_channel_that_is_a_product_goes_with_the_filters_of_either_factor() -> None:
    model, batches = Product(), data(8)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
    alive = Pruner(model, None, "random", seed=0).prune(0.5, batches).alive
    left = alive["first"] & alive["second"]
    assert not torch.equal(left, alive["first"])
    assert not torch.equal(left, alive["second"])
    assert torch.equal(parameter_masks(model)["norm.bias"], left)
    assert torch.equal(model.norm.bias != 0, left)
    weights = model.last.weight.detach() * left.view(1, 6, 1, 1)  # those that read a channel that is left
    found = scores(model, None, "magnitude")["last"]
    torch.testing.assert_close(found, weights.square().sum((1, 2, 3)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer", [nn.CircularPad1d((1, -1)), nn.ZeroPad1d((1, -1))], ids=["around", "along"])
def test_what_shifts_neurons_ends_what_goes_with_them(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 6), layer, nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    (first,) = unit_layers(model)
    assert (first.modules, first.readers) == (("0",), ())


class Cast(nn.Module):
    """Two convolutions, of which one has the type of the other, and whose code asks for a weight's type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.first.weight)
        first = self.first(inputs)
        return self.last((first.mean(1, keepdim=True) + self.norm(self.second(inputs).to(first))).mean((2, 3)))


def test_what_has_another_s_type_does_not_have_its_channels() -> None:
    first, second = unit_layers(Cast())
    assert (first.modules, second.modules) == (("first",), ("second", "norm"))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: x**0,
        lambda x: x.clamp(0.1, 6),
        lambda x: x.clamp(x.mean(), 6),
        lambda x: x.abs() ** x.mean(),
        lambda x: F.pad(x, [0] * 6),
    ],
    ids=[
        "padded by ones",
        "to the power of zero",
        "clamped above zero",
        "clamped above the mean",
        "to the power of the mean",
        "padded channels",
    ],
)
def test_what_makes_something_of_zero_ends_what_goes_with_a_filter(between: Callable[[Tensor], Tensor]) -> None:
    first, last = unit_layers(Separable(between))
    assert (first.modules, last.modules) == (("first", "norm"), ("last",))


ADDED: dict[str, Callable[[], nn.Module]] = {
    "a frozen normalisation": lambda: torchvision.ops.FrozenBatchNorm2d(6),
    "a position embedding": lambda: Embedded(),
}


class Embedded(nn.Module):
    """A position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 6, 8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.position


@pytest.mark.parametrize("case", ADDED)
def test_what_is_added_to_a_filter_s_output_does_not_go_with_it(case: str) -> None:
    added = ADDED[case]()
    for buffer in added.buffers():
        buffer.uniform_(0.5, 2.0)
    model, inputs = Separable(nn.ReLU()), torch.randn(4, 3, 8, 8)
    model.norm, outputs = added, []
    added.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    gone = ~Pruner(model, None, "random", seed=0).prune(0.4).alive["first"]
    model(inputs)
    assert gone.any()
    assert (outputs[-1][:, gone] == added(torch.zeros(1, 6, 8, 8))[:, gone]).all()
    assert (outputs[-1][:, gone] != 0).any()


class Optional(nn.Module):
    """A network that can do else than it does, if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(
        self,
        inputs: Tensor,
        features: bool = False,
        end: str = "mean",
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        hidden = F.relu(self.norm(self.body(inputs)))
        hidden = hidden if mask is None else hidden * mask
        if features:
            return hidden
        return self.head(hidden.mean((2, 3)) if end == "mean" else hidden.amax((2, 3))) * scale


def test_a_network_is_traced_as_it_runs_when_nothing_is_said() -> None:
    (layer,) = unit_layers(Optional())
    assert layer.modules == ("body", "norm")
    assert not layer.head


class WithHelper(nn.Module):
    """A head beside the network that training alone runs, as GoogLeNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 2)
        self.helper, self.helper_head = nn.Conv2d(6, 10, 1), nn.Linear(10, 2)

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = F.relu(self.stem(inputs))
        logits = self.head(F.relu(self.body(hidden)).mean((2, 3)))
        if self.training:
            return logits, self.helper_head(F.relu(self.helper(hidden)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("made_in_training", [True, False])
def test_what_training_alone_runs_is_not_ranked_in_whichever_mode_the_network_is(made_in_training: bool) -> None:
    model = WithHelper().train(made_in_training)
    pruner = Pruner(model, None, "taylor")
    alive = pruner.prune(0.5, [(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)]).alive
    model.train(not made_in_training)
    again = pruner.prune(0.7, [(torch.randn(4, 3, 8, 8), torch.arange(4) % 2)]).alive
    assert alive.keys() == again.keys() == {"stem", "body"}
    assert [sum(int(kept.sum()) for kept in one.values()) for one in (alive, again)] == [7, 4]
    assert model.training != made_in_training


@pytest.mark.parametrize("granularity", ["filter", "weight"])
@pytest.mark.parametrize(
    ("sparsity", "batches", "measure", "message"),
    [
        (1.0, None, "magnitude", r"sparsity must be in \[0, 1\), got 1.0"),
        (-0.5, None, "magnitude", r"sparsity must be in \[0, 1\), got -0.5"),
        (0.9999, None, "magnitude", r"asks for \d+ more units to be pruned, but only \d+ can be: every layer keeps"),
        (0.5, None, "snip", r"snip needs data: pass batches of \(inputs, labels\), got none"),
        (0.5, [], "grasp", r"grasp needs data: pass batches"),
        (0.5, "meta", "magnitude", "the model is on 2 devices .*: move it with"),
    ],
)
def test_bad_input_leaves_the_model_as_it_is(
    sparsity: float, batches: object, measure: str, message: str, granularity: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 2).backward()
    optimizer.step()
    if batches == "meta":
        batches, model[4] = None, model[4].to("meta")

    def everything() -> list[Tensor]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        grads = [parameter.grad for parameter in model.parameters()]
        return [
            one.clone() for one in (*model.state_dict().values(), *model.buffers(), *states, *grads) if not one.is_meta
        ]

    pruner = Pruner(model, optimizer, measure, granularity=granularity)
    before, random = everything(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        pruner.prune(sparsity, batches)
    assert all(map(torch.equal, everything(), before))
    assert torch.equal(random, torch.get_rng_state())
    assert not parameter_masks(model)
    assert all(kept.all() for kept in pruner.alive.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
