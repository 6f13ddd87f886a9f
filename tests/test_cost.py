"""Parameters and multiply-adds of a pruned network are those of a smaller one that has only what is left."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from prunable import NETWORKS, batch, trained
from test_masks import cut
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dynamics.models import build
from dynamics.pruning import Pruner, network_cost, scores


def counted(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and half of torch's FLOPs of one sample."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1"])
def test_what_is_left_costs_what_a_smaller_network_does(name: str) -> None:
    model, optimizer = trained(name)
    pruner = Pruner(model, optimizer, "magnitude")
    for sparsity in (0.3, 0.6):
        pruning = pruner.prune(sparsity, [batch(1)])
        found = (pruning.cost.parameters, pruning.cost.multiply_adds)
        assert found == counted(cut(model, pruning.alive), (1, 32, 32))
        assert (pruning.dense.parameters, pruning.dense.multiply_adds) == counted(model, (1, 32, 32))
        assert network_cost(model, (1, 32, 32)) == pruning.cost


# Counted by hand: Σ over layers of filters × input channels × kernel × pixels, and the head.
PUBLISHED = {"vgg13": 9_413_066, "mobilenet_v1": 3_217_226, "resnet56": 855_770}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_network_costs_what_the_papers_say(name: str) -> None:
    cost = network_cost(build(name, num_classes=10), (3, 32, 32))
    assert cost.parameters == PUBLISHED[name]
    if name == "resnet56":
        first = 3 * 16 * 9 * 1024
        stages = [16 * 16 * 9 * 1024 * 18]
        stages += [(16 * 32 + 17 * 32 * 32) * 9 * 256 + 16 * 32 * 256, (32 * 64 + 17 * 64 * 64) * 9 * 64 + 32 * 64 * 64]
        assert cost.multiply_adds == first + sum(stages) + 640


def test_a_residual_stream_narrows_only_where_all_that_feeds_it_is_silent() -> None:
    model, _ = trained("resnet")  # widths 4, 6, 8; images 32, 16, 8 pixels wide
    whole = network_cost(model, (1, 32, 32))
    first = {name: parameter.new_ones(parameter.shape).bool() for name, parameter in model.named_parameters()}
    for layer in ("blocks.1.conv2", "blocks.1.norm2"):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in first:
                first[name][0] = False
    one = network_cost(model, (1, 32, 32), first)
    filter_of_conv2 = 6 * 9
    assert whole.multiply_adds - one.multiply_adds == filter_of_conv2 * 16 * 16
    assert whole.parameters - one.parameters == filter_of_conv2 + 2
    for name in ("blocks.1.shortcut.0.weight", "blocks.1.shortcut.1.weight", "blocks.1.shortcut.1.bias"):
        first[name][0] = False
    both = network_cost(model, (1, 32, 32), first)
    slices = 8 * 9 * 8 * 8 + 8 * 1 * 8 * 8  # conv1 and shortcut of the next block no longer read that channel
    assert one.multiply_adds - both.multiply_adds == 4 * 16 * 16 + slices
    assert one.parameters - both.parameters == 4 + 2 + 8 * 9 + 8


def test_single_weights_count_as_they_are_used() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(48, 2))
    keep = {"0.weight": torch.ones(2, 1, 3, 3, dtype=torch.bool), "2.weight": torch.ones(3, 2, 1, 1, dtype=torch.bool)}
    keep["0.weight"][0], keep["0.weight"][1, 0, 0] = (
        False,
        False,
    )  # the first filter is silent, the second has 6 weights
    keep["2.weight"][2, 1] = False  # the third reads only the silent one
    cost = network_cost(model, (1, 6, 6), keep)
    assert cost.multiply_adds == (6 + 2) * 16 + 96
    assert cost.parameters == 6 + 2 + 3 + 96 + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_counting_leaves_no_trace(name: str) -> None:
    model, _ = trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    network_cost(model, (1, 32, 32))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "convnext_tiny"])
def test_nothing_is_silent_before_it_is_pruned(name: str) -> None:
    """Sigmoids, shuffled channels, other normalisations: a whole network costs all of itself."""
    model = getattr(torchvision.models, name)(num_classes=5)
    cost = network_cost(model, (3, 64, 64))
    assert (cost.parameters, cost.multiply_adds) == counted(model, (3, 64, 64))


class Standardised(nn.Conv2d):
    """Its weights less their mean, as in BiT."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(inputs, weight, self.bias, self.stride, self.padding)


class Shifted(nn.Module):
    """Pixels less their mean, as a network takes them that is given 0 … 255."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - 127.5) / 64


class Compared(nn.Module):
    """An image and its mirror image through one layer, and their difference."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head((self.both(inputs) - self.both(inputs.flip(3))).abs().mean((2, 3)))


def shifted() -> nn.Sequential:
    first, second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
    return nn.Sequential(Shifted(), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))


@pytest.mark.parametrize("case", ["standardised", "shifted", "compared"])
def test_what_is_zero_without_pruning_is_not_silent(case: str) -> None:
    standardised = nn.Sequential(
        Standardised(3, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(),
        nn.Linear(80, 2),
    )  # fmt: skip
    model = {"standardised": standardised, "shifted": shifted(), "compared": Compared()}[case]
    cost = network_cost(model, (3, 8, 8))
    assert (cost.parameters, cost.multiply_adds) == counted(model, (3, 8, 8))


def test_what_follows_negative_numbers_is_counted() -> None:
    model = shifted()
    cost = Pruner(model, None, "random", seed=0, protected=["3"]).prune(0.5, [(torch.zeros(1, 3, 8, 8), None)]).cost
    assert cost.multiply_adds == 3 * 27 * 36 + 5 * 27 * 16 + 160
    assert cost.parameters == 3 * 28 + 5 * 28 + 162


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_running_statistics_do_not_matter(statistic: str) -> None:
    """They are not finite after a batch that overflowed, whose step the loop may have skipped."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    getattr(model[1], statistic).fill_(torch.nan)
    cost = Pruner(model, None, "magnitude").prune(1 / 3, [(torch.rand(2, 1, 8, 8), None)]).cost
    assert cost.parameters == 2 * 10 + 2 * 2 + 2 * 2 * 9 + 2
    assert cost.multiply_adds == 2 * 9 * 36 + 2 * 2 * 9 * 16


def test_attention_is_counted() -> None:
    """Of 6 tokens: three projections and one, weights and values, two layers. torch's fast path hides them."""
    model = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True)
    assert network_cost(model, (6, 8)).multiply_adds == 6 * 8 * 24 + 6 * 8 * 8 + 2 * 6 * 6 * 8 + 2 * 6 * 8 * 10
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_reads_tokens_is_pruned_without_a_count() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    tokens = [(torch.arange(12).view(4, 3) % 9, torch.arange(4) % 3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for granularity, layers in (("filter", {"2"}), ("weight", {"2", "4"})):
        pruning = Pruner(model, optimizer, "loss_preservation", granularity=granularity).prune(0.4, tokens)
        assert pruning.scores.keys() == layers
        assert pruning.cost is None
        assert not {"parameters_left", "multiply_adds_left"} & pruning.attributes.keys()


class Pair(nn.Module):
    """What takes two images."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(1, 6, 3), nn.Linear(6, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.left(left) + self.right(right)).relu().mean((2, 3)))


class Casting(nn.Sequential):
    """What takes an image, but not in every precision."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.float())


@pytest.mark.parametrize("measure", ["magnitude", "fisher", "gradient_norm_increase"])
def test_what_takes_more_than_an_image_is_pruned_without_a_count(measure: str) -> None:
    images = torch.randn(4, 3, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4) % 2
    casting = Casting(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)).float()
    cases = (
        (Pair(), lambda model, batch: F.cross_entropy(model(*batch[:2]), batch[2])),
        (nn.Sequential(nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 2)),
         lambda model, batch: F.cross_entropy(model(batch[0].flatten(1)), batch[2])),
        (casting, lambda model, batch: F.cross_entropy(model(batch[0]), batch[2])),
    )  # fmt: skip
    for model, objective in cases:
        pruning = Pruner(model, None, measure, objective=objective).prune(0.5, [images])
        assert sum(int(kept.sum()) for kept in pruning.alive.values()) == round(
            0.5 * sum(map(len, pruning.alive.values()))
        )
        assert pruning.cost is pruning.dense is None
        assert not {"parameters_left", "multiply_adds_left"} & pruning.attributes.keys()
        with pytest.raises(ValueError, match=r"synflow runs the model on one input of ones, .*8, 8\), which failed"):
            scores(model, [images], "synflow", objective=objective)


def test_filters_pruned_after_single_weights_are_counted_without_either() -> None:
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 4, bias=False))
    batches = [(torch.rand(3, 6), None)]
    Pruner(model, None, "magnitude", granularity="weight").prune(0.4, batches)
    cost = Pruner(model, None, "magnitude").plan(0.5, batches).cost
    Pruner(model, None, "magnitude").prune(0.5)
    read = model[0].weight.any(1)
    left = int(model[0].weight.count_nonzero() + model[2].weight[:, read].count_nonzero())
    assert (cost.parameters, cost.multiply_adds) == (left, left)


def bare() -> nn.Sequential:
    first, second = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(24, 3, bias=False))


def test_what_torch_prunes_is_counted_as_gone() -> None:
    filters, weights = bare(), bare()
    prune.ln_structured(filters[0], "weight", 1, n=2, dim=0)
    cost = network_cost(filters, (1, 6, 6))
    assert cost.parameters == 3 * 9 + 6 * 3 * 9 + 72  # what would have read the fourth channel is gone, too
    assert cost.multiply_adds == 3 * 9 * 16 + 6 * 3 * 9 * 4 + 72
    prune.l1_unstructured(weights[2], "weight", 100)
    cost = network_cost(weights, (1, 6, 6))
    assert cost.parameters == 36 + 116 + 72
    assert cost.multiply_adds == 36 * 16 + 116 * 4 + 72


def test_a_parameter_named_as_torch_names_what_it_prunes_is_one_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))
    model[2].weight_orig = nn.Parameter(torch.ones_like(model[2].weight))  # no forward pass reads it
    first = {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}
    first["0.weight"][0] = False
    cost = network_cost(model, (1, 8, 8), first)
    assert cost.parameters == 3 * 9 + 2 * 3 * 9 + 2 * 4 * 9
    assert cost.multiply_adds == 3 * 9 * 36 + 2 * 3 * 9 * 16


def test_a_weight_that_is_computed_from_another_reads_no_silent_channel() -> None:
    model = bare()
    nn.utils.parametrizations.spectral_norm(model[2])
    cost = Pruner(model, None, "magnitude", protected=["2"]).prune(0.5, [(torch.rand(2, 1, 6, 6), None)]).cost
    assert cost.parameters == 2 * 9 + 6 * 2 * 9 + 72
    assert cost.multiply_adds == 2 * 9 * 16 + 6 * 2 * 9 * 4 + 72


class Lifted(nn.Module):
    """To what a convolution puts out something is added before the next one reads it."""

    def __init__(self, added: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
        self.register_buffer("buffer", torch.full((1, 6, 1, 1), 0.25))
        self.number, self.parameter = 0.5, nn.Parameter(torch.full((1, 6, 1, 1), 0.5))
        self.added = added

    def forward(self, inputs: Tensor) -> Tensor:
        channels = (self.first(inputs) + getattr(self, self.added)).relu()
        return self.head(self.second(channels).relu().mean((2, 3)))


@pytest.mark.parametrize("added", ["number", "buffer", "parameter"])
def test_a_channel_that_is_constant_where_its_filter_went_is_read(added: str) -> None:
    model = Lifted(added)
    whole = sum(parameter.numel() for parameter in model.parameters())
    pruning = Pruner(model, None, "magnitude", protected=["second"]).prune(0.5, [(torch.rand(2, 3, 8, 8), None)])
    read = []
    model.second.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].amax((0, 2, 3))))
    model(torch.rand(2, 3, 8, 8))
    assert (read[0][~pruning.alive["first"]] > 0).all()  # not silent, so that its weights in the next are of use
    assert pruning.cost.parameters == whole - 3 * 28
    assert pruning.cost.multiply_adds == 3 * 27 * 36 + 5 * 6 * 9 * 16 + 10


def test_a_layer_that_stands_in_two_blocks_is_counted_in_both() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    blocks = nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.ReLU())
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * 64, 2))
    pruning = Pruner(model, None, "random", seed=0).prune(0.5, [(torch.rand(2, 4, 8, 8), None)])
    assert pruning.dense.multiply_adds == 2 * 4 * 4 * 9 * 64 + 512
    assert pruning.cost.multiply_adds == 2 * 2 * 4 * 9 * 64 + 256  # in one place it reads all channels
    assert pruning.cost.parameters == 2 * 4 * 9 + 2 + 256 + 2


class Joined(nn.Module):
    """What two convolutions put out, side by side, is normalised before the next one reads it."""

    def __init__(self, normalisation: nn.Module) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.normalisation, self.next, self.head = normalisation, nn.Conv2d(8, 5, 3), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        joined = torch.cat([self.left(inputs), self.right(inputs)], 1)
        return self.head(self.next(self.normalisation(joined)).relu().mean((2, 3)))


NORMALISATIONS = {
    "batches": lambda: nn.BatchNorm2d(8),
    "groups": lambda: nn.GroupNorm(2, 8),
    "samples": lambda: nn.LayerNorm([8, 6, 6]),
    "samples, without a bias": lambda: nn.LayerNorm([8, 6, 6], bias=False),
    "instances": lambda: nn.InstanceNorm2d(8, affine=True),
    "instances, without a bias": lambda: nn.InstanceNorm2d(8),
    "scale alone": lambda: nn.RMSNorm([8, 6, 6]),
}


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_a_channel_of_which_a_normalisation_makes_something_is_read(kind: str) -> None:
    model = Joined(NORMALISATIONS[kind]())
    for tensor in (*model.normalisation.parameters(), *model.normalisation.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1)
    pruning = Pruner(model, None, "magnitude", protected=["next"]).prune(0.5, [(torch.rand(2, 3, 8, 8), None)])
    read = []
    model.next.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].abs().amax((0, 2, 3)) > 0))
    model.eval()(torch.rand(2, 3, 8, 8))
    channels = int(read[0].sum())
    assert channels == (4 if kind in ("instances, without a bias", "scale alone") else 8)
    assert pruning.cost.multiply_adds == 4 * 27 * 36 + 5 * channels * 9 * 16 + 10
