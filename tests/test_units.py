"""What goes with a filter: all that its channel runs through alone, and nothing that it shares."""

import copy
from collections import Counter

import pytest
import torch
from prunable import NETWORKS, goes_with, parameters_with
from torch import Tensor, nn

from dynamics.models import build
from dynamics.pruning import Pruner, network_cost
from dynamics.pruning.candidates.units import unit_layers

PUBLISHED = {"vgg13": (10, 2944), "mobilenet_v1": (14, 5984), "resnet56": (57, 2128)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_so_many_filters(name: str) -> None:
    layers = unit_layers(build(name, num_classes=10))
    assert (len(layers), sum(layer.filters for layer in layers)) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*NETWORKS, "resnet56"])
def test_modules_that_go_with_a_filter(name: str) -> None:
    model = NETWORKS[name]() if name in NETWORKS else build(name, num_classes=10, width=0.1)
    assert {layer.name: list(layer.modules) for layer in unit_layers(model)} == goes_with(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_normalisation_over_processes_goes_with_a_filter_as_any_other(name: str) -> None:
    plain = NETWORKS[name]()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1 * torch.rand_like(parameter)  # β is no zero
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert {layer.name: list(layer.modules) for layer in unit_layers(synchronised)} == goes_with(plain)
    costs, outputs = [], []
    for model in (plain, synchronised.eval()):
        Pruner(model, None, "bn_scale").prune(0.5)
        costs.append(network_cost(model, (1, 32, 32)))
        outputs.append(model.eval()(torch.ones(2, 1, 32, 32)))
    assert costs[0] == costs[1]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*NETWORKS, "resnet56"])
def test_every_parameter_but_the_head_s_goes_with_one_layer(name: str) -> None:
    model = NETWORKS[name]() if name in NETWORKS else build(name, num_classes=10, width=0.1)
    found = {layer.name: layer.parameter_names(model) for layer in unit_layers(model)}
    assert found == parameters_with(model)
    times = Counter(parameter for names in found.values() for parameter in names)
    head = {"classifier.weight", "classifier.bias"}
    assert times == Counter(parameter for parameter, _ in model.named_parameters() if parameter not in head)


@pytest.mark.parametrize("name", NETWORKS)
def test_first_dimension_is_the_filter(name: str) -> None:
    model = NETWORKS[name]()
    for layer in unit_layers(model):
        assert {len(model.get_parameter(parameter)) for parameter in layer.parameter_names(model)} == {layer.filters}


class Bypassed(nn.Module):
    """A convolution whose channels are normalised on one way and bypass the normalisation on another."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.norm, self.after = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.convolution(inputs)
        return self.after(self.norm(features) + features)


def test_a_sum_ends_what_goes_with_a_filter() -> None:
    (layer,) = unit_layers(Bypassed())
    assert layer.modules == ("convolution", "norm")
    assert layer.parameter_names(Bypassed())[:2] == ["convolution.weight", "convolution.bias"]


def test_a_normalisation_of_flattened_pixels_goes_with_no_filter() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 16), nn.Linear(64, 2))
    assert model(torch.randn(2, 1, 6, 6)).shape == (2, 2)
    (layer,) = unit_layers(model)
    assert layer.modules == ("0",)
    assert layer.normalisation(model) is None


def test_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="layer '0' has 2 groups: only plain and depthwise convolutions are pruned"):
        unit_layers(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)))
