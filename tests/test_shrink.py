"""A shrunk network is the masked one without its zeros: it computes and trains the same; its units keep their names."""

import copy
import operator
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from other_optimizers import Lookahead, WithoutHooks
from prunable import NETWORKS, OPTIMIZERS, batch, goes_with, parameters_with, train
from prunable import trained as trained_small
from test_masks import cut
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, efficientnet_b0, resnet18

from dynamics import Recorder, open_run
from dynamics.models import MODELS, build
from dynamics.network.masks import apply_masks, filters_left, parameter_masks
from dynamics.pruning import Pruner, latency, network_cost, scores, shrink

Trained = tuple[nn.Module, torch.optim.Optimizer]


class GrayResNet18(nn.Module):
    """torchvision's ResNet-18 for the tests' gray images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = resnet18(num_classes=4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs.expand(-1, 3, -1, -1))


WHOLE: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(build, name, num_classes=4, in_channels=1, width=0.25) for name in MODELS},
    "vgg13": NETWORKS["vgg13"],
    "mobilenet_v1": NETWORKS["mobilenet_v1"],
    "resnet18": GrayResNet18,
}


def trained(name: str, optimizer_name: str = "sgd", steps: int = 2) -> Trained:
    if name in NETWORKS:
        return trained_small(name, optimizer_name, steps)
    model = WHOLE[name]()
    optimizer = OPTIMIZERS[optimizer_name](list(model.parameters()))
    train(model, optimizer, steps)
    return model, optimizer


def twin(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
    """Copies of both, with nothing shared."""
    other = copy.deepcopy(model)
    of_other = type(optimizer)(other.parameters(), lr=0.1)
    of_other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, of_other


def silence(model: nn.Module, optimizer: torch.optim.Optimizer, units: dict[str, list[int]]) -> None:
    """Mask all that the named modules have of the units."""
    keep = {}
    for name, indices in units.items():
        for leaf, parameter in model.get_submodule(name).named_parameters(recurse=False):
            keep[f"{name}.{leaf}"] = torch.ones_like(parameter, dtype=torch.bool)
            keep[f"{name}.{leaf}"][indices] = False
    apply_masks(model, keep, optimizer)


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weights_of(model: nn.Module) -> list[Tensor]:
    """Those of its convolutions and linear layers."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", WHOLE)
def test_it_computes_and_trains_as_the_masked_network(name: str, optimizer_name: str) -> None:
    model, optimizer = trained(name, optimizer_name)
    Pruner(model, optimizer, "magnitude").prune(0.5)
    masked, of_masked = twin(model, optimizer)
    kept = shrink(model, optimizer).kept
    assert weights(model) < 0.8 * weights(masked)
    for steps in range(3):
        for mode in (True, False):
            with torch.no_grad():
                logits, expected = (copy.deepcopy(one).train(mode)(batch(7)[0]) for one in (model, masked))
            assert_same(logits, expected)
        pairs = zip(model.named_parameters(), masked.parameters(), strict=True)
        for (parameter_name, parameter), whole in pairs:
            where = kept.get(parameter_name, torch.arange(whole.numel()).view(whole.shape))
            assert_same(parameter, whole.flatten()[where])
            for key, value in of_masked.state[whole].items():
                if value.ndim:
                    assert_same(optimizer.state[parameter][key], value.flatten()[where])
                else:
                    assert optimizer.state[parameter][key] == value
        if steps < 2:
            train(model.train(), optimizer, 1)
            train(masked.train(), of_masked, 1)


@pytest.mark.parametrize("wrapper", [Lookahead, WithoutHooks])
def test_an_optimizer_inside_a_wrapper_trains_on_as_the_masked_network_s(wrapper: type) -> None:
    model, inner = trained("vgg13")
    masked, of_masked = twin(model, inner)
    dense, small = (masked, wrapper(of_masked)), (model, wrapper(inner))
    for pair in (dense, small):
        train(*pair, 1)
        Pruner(*pair, "magnitude").prune(0.5)
    kept = shrink(*small).kept
    for pair in (dense, small):
        train(*pair, 3)
    for (name, parameter), whole in zip(model.named_parameters(), masked.parameters(), strict=True):
        assert_same(parameter, whole.flatten()[kept[name]] if name in kept else whole)


def test_what_an_optimizer_keeps_of_all_parameters_by_a_name_is_refused() -> None:
    model, optimizer = trained("vgg13")
    Pruner(model, optimizer, "magnitude").prune(0.5)
    optimizer.state["all"] = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    with pytest.raises(ValueError, match="SGD keeps 'all' of its parameters in a shape of its own"):
        shrink(model, optimizer)


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1"])
def test_it_is_the_network_cut_by_hand(name: str) -> None:
    model, optimizer = trained(name)
    alive, before = Pruner(model, optimizer, "magnitude").prune(0.4).alive, weights_of(model)
    by_hand = cut(model, alive)
    shrunk = shrink(model, optimizer)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in by_hand.state_dict().items()
    }
    assert all(map(torch.equal, model.state_dict().values(), by_hand.state_dict().values()))
    for layer, kept in alive.items():
        assert torch.equal(shrunk.units[layer], kept.nonzero().flatten())
    (left, whole), count = (sum(map(len, of)) for of in (weights_of(by_hand), before)), len(before)
    assert repr(shrunk) == f"<Shrunk: {left} of {whole} units left in {count} layers>"
    assert str(model) == str(by_hand)  # the modules say their new sizes
    assert not parameter_masks(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1", "resnet"])
def test_it_costs_what_was_said_of_the_masked_network(name: str) -> None:
    model, optimizer = trained(name)
    Pruner(model, optimizer, "magnitude").prune(0.4)
    said = network_cost(model, (1, 32, 32))
    shrink(model, optimizer)
    assert network_cost(model, (1, 32, 32)) == said
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch(0)[0])
    if name == "resnet":  # what is silenced in residual sums is still computed
        assert counter.get_total_flops() > 2 * 8 * said.multiply_adds
    else:
        assert (weights(model), counter.get_total_flops()) == (said.parameters, 2 * 8 * said.multiply_adds)


def test_gradients_go_along_and_the_optimizer_is_the_same() -> None:
    model, optimizer = trained("vgg13")
    Pruner(model, optimizer, "magnitude").prune(0.5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    groups = [(id(group), id(group["params"])) for group in optimizer.param_groups]
    kept = shrink(model, optimizer).kept
    for name, parameter in model.named_parameters():
        expected = gradients[name].flatten()[kept[name]] if name in kept else gradients[name]
        assert torch.equal(parameter.grad, expected)
    assert [(id(group), id(group["params"])) for group in optimizer.param_groups] == groups
    assert all(map(operator.is_, optimizer.param_groups[0]["params"], model.parameters()))
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_what_reads_a_silenced_filter_may_hold_anything(optimizer_name: str) -> None:
    """The filter puts out exact zeros, so what stays cannot tell the values, momentum or decay of what reads them."""
    model, optimizer = trained("vgg13", optimizer_name)
    gone = [0, 3]
    silence(model, optimizer, {"features.0": gone, "features.2": gone})
    other, of_other = twin(model, optimizer)
    slices = []
    for network, its_optimizer, scale in ((model, optimizer, 1.0), (other, of_other, -7.0)):
        reader = network.features[3].weight
        with torch.no_grad():
            reader[:, gone] *= scale
            for value in its_optimizer.state[reader].values():
                if value.ndim:
                    value[:, gone] *= abs(scale)
        before = reader[:, gone].clone()
        train(network, its_optimizer, 2)
        assert (reader.grad[:, gone] == 0).all()
        slices.append((before, reader[:, gone]))
    assert all((before != after).any() for before, after in slices)  # it moves all the same: by momentum and decay
    for mode in (True, False):
        assert torch.equal(model.train(mode)(batch(7)[0]), other.train(mode)(batch(7)[0]))
    shrink(model, optimizer)
    shrink(other, of_other)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_what_shares_a_channel_stays_until_all_of_it_is_silent() -> None:
    model, optimizer = trained("resnet")
    stage = ["blocks.1.conv2", "blocks.1.norm2", "blocks.1.shortcut.0", "blocks.1.shortcut.1"]
    silence(model, optimizer, {name: [0, 2] for name in stage[:2]} | {name: [2, 3] for name in stage[2:]})
    masked, _ = twin(model, optimizer)
    shrunk = shrink(model, optimizer)
    left = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(shrunk.units["blocks.1.conv2"], left)
    assert torch.equal(shrunk.units["blocks.1.shortcut.0"], left)
    assert model.blocks[2].conv1.in_channels == 5
    masks = parameter_masks(model)
    assert set(masks) == {
        f"{name}.{leaf}" for name in stage for leaf, _ in model.get_submodule(name).named_parameters()
    }
    assert masks["blocks.1.norm2.bias"].tolist() == [False, True, True, True, True]
    assert masks["blocks.1.shortcut.1.bias"].tolist() == [True, True, False, True, True]
    shortcut = model.blocks[1].shortcut[0]
    shortcut.weight.grad = None
    F.conv2d(torch.ones(1, 4, 3, 3), shortcut.weight).sum().backward()
    assert torch.equal(shortcut.weight.grad != 0, masks["blocks.1.shortcut.0.weight"])
    assert_same(model(batch(7)[0]), masked(batch(7)[0]))
    train(model, optimizer, 2)
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert (model.get_parameter(name)[mask] != 0).all()


def test_a_layer_keeps_one_unit_and_the_logits_stay_as_many() -> None:
    model, optimizer = trained("vgg13")
    silence(model, optimizer, {"features.3": list(range(5)), "features.5": list(range(5)), "classifier": [1]})
    masked, _ = twin(model, optimizer)
    shrunk = shrink(model, optimizer)
    assert shrunk.units["features.3"].tolist() == [0]
    assert shrunk.units["classifier"].tolist() == [0, 1, 2, 3]
    assert not parameter_masks(model)["features.3.weight"].any()
    assert_same(model(batch(7)[0]), masked(batch(7)[0]))


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1", "resnet"])
def test_units_are_the_original_networks_through_all_rounds(name: str) -> None:
    model, optimizer = trained(name)
    masked, of_masked = twin(model, optimizer)
    for measure in ("magnitude", "loss_preservation", "taylor"):
        pruned = Pruner(model, optimizer, measure).prune(0.25, [batch(9)])
        shrunk = shrink(model, optimizer)
        assert shrunk.units.keys() == {
            layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
        }
        of_all = {layer: torch.zeros(total, dtype=torch.bool) for layer, total in shrunk.totals.items()}
        for layer, left in shrunk.units.items():
            of_all[layer][left] = True
        parameters = parameters_with(masked)
        masks = {
            parameter: of_all[layer]
            .view(-1, *[1] * (masked.get_parameter(parameter).ndim - 1))
            .expand_as(masked.get_parameter(parameter))
            for layer in pruned.alive
            if layer in parameters
            for parameter in parameters[layer]
        }
        apply_masks(masked, masks, of_masked)
        silent = {
            key.removesuffix(".weight"): ~mask.flatten(1).any(1)
            for key, mask in parameter_masks(model).items()
            if mask.ndim > 1
        }
        for layer, gone in silent.items():
            silence(masked, of_masked, dict.fromkeys(goes_with(masked)[layer], shrunk.units[layer][gone]))
        for mode in (True, False):
            assert_same(copy.deepcopy(model).train(mode)(batch(7)[0]), copy.deepcopy(masked).train(mode)(batch(7)[0]))
        train(model.train(), optimizer, 1)
        train(masked.train(), of_masked, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_magnitude_ranks_what_is_left_as_in_the_masked_network(name: str) -> None:
    model, optimizer = trained(name)
    Pruner(model, optimizer, "random", seed=0).prune(0.4)
    train(model, optimizer, 1)
    masked = scores(model, None, "magnitude")
    left = {layer: values[filters_left(model, layer)] for layer, values in masked.items()}
    shrink(model, optimizer)
    found = scores(model, None, "magnitude")
    assert found.keys() == left.keys()
    for layer, values in found.items():
        torch.testing.assert_close(values[values > 0], left[layer])


def test_a_mask_that_masks_nothing_goes() -> None:
    model, optimizer = trained("vgg13")
    twin_model, _ = twin(model, optimizer)
    silence(model, optimizer, {"features.0": []})
    assert shrink(model, optimizer).kept == {}
    assert not parameter_masks(model)
    for network in (model, twin_model):
        network.zero_grad()
        network(batch(0)[0]).square().sum().backward()
    assert torch.equal(model.features[0].weight.grad, twin_model.features[0].weight.grad)


def test_a_depthwise_layer_of_one_channel_is_still_one() -> None:
    model, optimizer = trained("mobilenet_v1")
    layers = list(Pruner(model, optimizer, "magnitude").alive)
    gone = [unit for unit in range(model.stem.out_channels) if unit != 1]
    silence(model, optimizer, dict.fromkeys(goes_with(model)["stem"], gone))
    for _ in range(2):
        shrunk = shrink(model, optimizer)
        assert model.blocks[0].depthwise.groups == 1
        assert shrunk.units["blocks.0.depthwise"].tolist() == [1]
        assert list(Pruner(model, optimizer, "magnitude").alive) == layers


def test_a_later_event_is_recorded_in_the_original_units(tmp_path: Path) -> None:
    model, optimizer = trained("vgg13")
    probe = [batch(5)]
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        with recorder.event("prune", probe=probe) as event:
            first = Pruner(model, optimizer, "magnitude").prune(0.4)
            event.units(alive=first.alive, scores=first.scores)
        shrunk = shrink(model, optimizer)
        with recorder.event("prune", probe=probe) as event:
            second = Pruner(model, optimizer, "magnitude").prune(0.3)
            event.units(alive=shrunk.expand(second.alive), scores=shrunk.expand(second.scores))
        with recorder.event("look", probe=probe) as event:
            event.units(alive=second.alive, scores=second.scores)
    units = open_run(tmp_path / "run.zarr").units
    alive, score = units.alive.values, units.score.values
    assert alive.shape[1] == sum(len(kept) for kept in first.alive.values())
    assert not (alive[1] & ~alive[0]).any()
    assert alive[1].sum() == sum(int(kept.sum()) for kept in second.alive.values())
    assert (torch.tensor(score[1]).isnan() == torch.tensor(~alive[0])).all()
    assert score[1][alive[0]].tolist() == torch.cat(list(second.scores.values())).tolist()
    np.testing.assert_array_equal(alive[2], alive[1])  # given for the units it has, they are the same
    np.testing.assert_array_equal(score[2], score[1])
    with pytest.raises(ValueError, match=r"layer 'features.0' was given values of shape \(1,\), but it has \d+ units"):
        shrunk.expand({"features.0": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layer 'conv' was given values of shape .* but layers are .*'features.0'"):
        shrunk.expand({"conv": torch.zeros(1)})


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_a_pruner_or_plan_of_before_says_so_and_leaves_all_alone(granularity: str) -> None:
    model, optimizer = trained("vgg13")
    old = Pruner(model, optimizer, "magnitude", granularity=granularity)
    plan = old.plan(0.7)
    Pruner(model, optimizer, "magnitude").prune(0.4)
    shrink(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), parameter_masks(model)))
    stale = r"^layer 'features.\d+' had units of shape \(.*\) when .* was made, and now has \(.*\): make a new Pruner"
    for use in (lambda: old.plan(0.6), lambda: old.prune(0.6), lambda: old.apply(plan)):
        with pytest.raises(ValueError, match=stale):
            use()
    with pytest.raises(ValueError, match=stale):
        Pruner(model, optimizer, "magnitude", granularity=granularity).apply(plan)
    after = (model.state_dict(), optimizer.state_dict(), parameter_masks(model))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_new_pruner_knows_what_is_silent_and_could_not_go() -> None:
    model, optimizer = trained("resnet")
    silence(model, optimizer, {"blocks.1.conv2": [0, 2], "blocks.1.norm2": [0, 2]})
    shrink(model, optimizer)
    pruner = Pruner(model, optimizer, "random", seed=0)
    assert pruner.alive["blocks.1.conv2"].tolist() == [False, True, False, True, True, True]
    total = sum(map(len, pruner.alive.values()))
    assert sum(int(kept.sum()) for kept in pruner.prune(5 / total).alive.values()) == total - 5  # 3 more
    weights = Pruner(model, optimizer, "magnitude", granularity="weight").alive["blocks.1.conv2"]
    assert torch.equal(weights.flatten(1).any(1), pruner.alive["blocks.1.conv2"])


def test_channels_are_followed_through_flattening_and_concatenation() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
            self.joined = nn.Conv2d(10, 5, 3, padding=1)
            self.head = nn.Linear(5 * 64, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            joined = self.joined(torch.cat([F.silu(self.left(inputs)), F.relu(self.right(inputs))], 1))
            return self.head(F.max_pool2d(F.gelu(joined), 4).flatten(1))

    model = Branches().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 1)
    silence(model, optimizer, {"left": [1], "right": [0, 5], "joined": [2, 4]})
    masked, of_masked = twin(model, optimizer)
    shrink(model, optimizer)
    assert torch.equal(model.joined.weight, masked.joined.weight[[0, 1, 3]][:, [0, 2, 3, 5, 6, 7, 8]])
    assert torch.equal(model.head.weight.view(4, 3, 64), masked.head.weight.view(4, 5, 64)[:, [0, 1, 3]])
    assert model.joined.weight.is_contiguous(memory_format=torch.channels_last)
    for network, its_optimizer in ((model, optimizer), (masked, of_masked)):
        train(network, its_optimizer, 2)
    assert_same(model(batch(7)[0]), masked(batch(7)[0]))


class OfMapping(nn.Sequential):
    """A network of all that belongs to a sample; it looks at the image, a part of which may be masked."""

    def forward(self, sample: dict[str, Tensor], mask: Tensor | float = 1.0) -> Tensor:
        return super().forward(sample["image"] * mask)


def test_channels_are_followed_from_whatever_the_model_takes_in_whatever_order() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    model = OfMapping(*layers).to(memory_format=torch.channels_last)
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"0": [1, 2], "2": [5]})
    masked, inputs = copy.deepcopy(model), {"image": batch(7)[0].to(memory_format=torch.channels_last)}
    shrink(model, inputs=inputs)
    assert model[2].weight.shape == (5, 2, 3, 3)
    assert_same(model(inputs), masked(inputs))


class OfTwo(nn.Module):
    """A network of an image and of what is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, image: Tensor, other: Tensor, scale: float = 1.0) -> Tensor:
        return self.head((self.left(image).relu() + scale * self.right(other).relu()).mean((2, 3)))


@pytest.mark.parametrize("given", ["a tuple", "a list", "by name"])
def test_a_model_of_several_inputs_is_given_all_of_them(given: str) -> None:
    model, (images, _) = OfTwo(), batch(7)
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"left": [1, 2], "right": [1, 2]})
    masked, inputs = copy.deepcopy(model), (images, 2 * images)
    by_name = {"other": 2 * images, "image": images}
    shrink(model, inputs={"a tuple": inputs, "a list": list(inputs), "by name": by_name}[given])
    assert model.head.weight.shape == (3, 2)
    assert_same(model(*inputs), masked(*inputs))
    assert latency(model, inputs, repeats=1) > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 4, 8)])
def test_neurons_that_see_one_token_after_another_are_followed(shape: tuple[int, ...], bias: bool) -> None:
    """A linear layer of more than two dimensions is a product of matrices between two views."""
    layers = nn.Linear(8, 12, bias), nn.GELU(), nn.Linear(12, 6, bias), nn.Tanh(), nn.Linear(6, 4)
    model, inputs = nn.Sequential(*layers), torch.randn(shape)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    silence(model, optimizer, {"0": [0, 5, 11], "2": [3]})
    masked, of_masked = twin(model, optimizer)
    shrink(model, optimizer, inputs=inputs)
    assert [tuple(layer.weight.shape) for layer in model[::2]] == [(9, 8), (5, 9), (4, 5)]
    for _ in range(3):
        assert_same(model(inputs), masked(inputs))
        for network, its_optimizer in ((model, optimizer), (masked, of_masked)):
            its_optimizer.zero_grad()
            network(inputs).square().sum().backward()
            its_optimizer.step()


def test_gates_on_channels_stay_whole() -> None:
    """Squeeze and excitation: a filter's channel is multiplied by a gate that nobody silenced."""
    torch.set_default_dtype(torch.float32)
    model = efficientnet_b0(num_classes=4).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    silence(model, optimizer, {"features.1.0.block.0.0": [0, 3], "features.1.0.block.0.1": [0, 3]})
    before = weights(model)
    shrink(model, optimizer)
    assert weights(model) == before
    assert parameter_masks(model)


class Gated(nn.Module):
    """Channels with a silent filter among them, and what multiplies them or what they are added to."""

    def __init__(self, applied: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.excite, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.applied = applied

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        return self.last(self.applied(hidden, self.excite(hidden.mean((2, 3), keepdim=True)))).mean((2, 3))


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gates": lambda hidden, gates: hidden * gates.sigmoid(),
    "gates of a mean over channels": lambda hidden, gates: hidden + gates.tanh() * hidden.mean(1, keepdim=True),
    "lifted channels": lambda hidden, gates: (hidden + 1) * gates,
}


@pytest.mark.parametrize("how", GATED)
def test_channels_that_others_gate_or_are_added_to_stay(how: str) -> None:
    model = Gated(GATED[how])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    silence(model, optimizer, {"first": [0, 2]})
    masked, of_masked = twin(model, optimizer)
    before = weights(model)
    shrink(model, optimizer)
    assert weights(model) == before
    for _ in range(3):
        assert_same(model(batch(7)[0]), masked(batch(7)[0]))
        train(model, optimizer, 1)
        train(masked, of_masked, 1)


def test_a_shift_of_channels_that_stay_is_no_matter() -> None:
    class Summed(Odd):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.other, self.shift = nn.Conv2d(1, 4, 3, padding=1), nn.Parameter(torch.zeros(()))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second((self.first(inputs) + self.shift + self.other(inputs)).relu()).mean((2, 3))

    model = Summed()
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"first": [1]})
    before = weights(model)
    shrink(model)
    assert weights(model) == before


def test_a_layer_may_be_called_as_what_torch_keeps_is() -> None:
    model = nn.Sequential(OrderedDict(conv_orig=nn.Conv2d(1, 4, 3), last=nn.Conv2d(4, 2, 1)))
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"conv_orig": [1]})
    shrink(model)
    assert model.conv_orig.weight.shape == (3, 1, 3, 3)


class Optional(nn.Module):
    """One input is a pair; the other is an option."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
        one, other = pair
        return self.last(self.first(scale * one + other).relu())


def test_a_pair_that_is_one_input_stays_one() -> None:
    model, inputs = Optional(), (torch.randn(3, 4), torch.randn(3, 4))
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"first": [1, 2]})
    shrink(model, inputs=inputs)
    assert model.first.weight.shape == (6, 4)
    assert latency(torch.compile(model, backend="eager"), inputs, repeats=1, warm_up=1) > 0


PASSED: dict[str, tuple[int, Callable[[], nn.Module]]] = {  # what a pruner follows channels through, by dimensions
    "pooling": (1, lambda: nn.Sequential(nn.MaxPool1d(2), nn.AvgPool1d(2))),
    "adaptive pooling": (1, lambda: nn.AdaptiveAvgPool1d(2)),
    "adaptive maximum": (1, lambda: nn.AdaptiveMaxPool1d(2)),
    "dropout": (1, lambda: nn.Dropout1d()),
    "linear upsampling": (1, lambda: nn.Upsample(scale_factor=2, mode="linear")),
    "upsampling": (1, lambda: nn.Upsample(scale_factor=2)),
    "bicubic upsampling": (2, lambda: nn.Upsample(scale_factor=2, mode="bicubic")),
    "padding": (2, lambda: nn.ZeroPad2d(1)),
    "activations": (2, lambda: nn.Sequential(nn.CELU(), nn.RReLU(), nn.Softsign(), nn.Hardshrink(0.01), nn.SELU())),
    "shrinking": (2, lambda: nn.Softshrink(0.01)),
    "volumes": (3, lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.MaxPool3d(2))),
    "trilinear upsampling": (3, lambda: nn.Upsample(scale_factor=2, mode="trilinear")),
}


@pytest.mark.parametrize("case", PASSED)
def test_what_passes_channels_by_themselves_is_followed(case: str) -> None:
    dimensions, make = PASSED[case]
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(convolution(2, 6, 3), make(), convolution(6, 4, 1))
    Pruner(model, None, "random", seed=0).prune(0.3)
    masked, inputs = copy.deepcopy(model), torch.randn(2, 2, *[8] * dimensions)
    shrink(model, inputs=inputs)
    assert len(model[0].weight) == 3
    assert_same(model.eval()(inputs), masked.eval()(inputs))


def test_dropout_before_a_normalisation_is_no_other_network() -> None:
    """It drops other entries of a smaller tensor, in training mode, and moves the running statistics by them."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Flatten(),
        nn.Linear(6 * 28 * 28, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer, 2)
    silence(model, optimizer, {"0": [1, 4], "3": [2], "4": [2]})
    masked, _ = twin(model, optimizer)
    shrink(model, optimizer)
    assert model[0].weight.shape == (4, 1, 3, 3)
    assert model[3].weight.shape == (5, 4, 3, 3)
    assert_same(model.eval()(batch(7)[0]), masked.eval()(batch(7)[0]))


class Odd(nn.Module):
    """A silenced convolution whose channels meet something before the next one reads them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.between = between

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.between(F.relu(self.first(inputs)))).mean((2, 3))


class Shifted(nn.Module):
    """A parameter that nobody has trained yet is added to all channels; the silenced ones are not silent for long."""

    def __init__(self, shifts: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.shifts, self.shift = shifts, nn.Parameter(torch.zeros(shape), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shifts(hidden, self.shift).relu()


class OnlyInTraining(Odd):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.helper = nn.Conv2d(4, 4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.first(inputs))
        return self.second(hidden).mean((2, 3)) + (self.helper(hidden).mean((2, 3)) if self.training else 0)


def tied() -> nn.Module:
    model = Odd(nn.Conv2d(4, 4, 3, padding=1))
    model.between.weight = model.second.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    return model


class SplitTwice(Odd):
    """Two layers' channels, joined, and their halves exchanged twice."""

    def __init__(self) -> None:
        super().__init__(lambda hidden: torch.cat([hidden, self.other(hidden)], 1))
        self.other, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.between(F.relu(self.first(inputs)))
        for _ in range(2):
            hidden = torch.cat(hidden.chunk(2, 1)[::-1], 1)
        return self.second(hidden).mean((2, 3))


UNKNOWN = {
    "torch-pruning cannot follow the channels of layer 'first': IndexError": SplitTwice,
    "'between' \\(GroupNorm": lambda: Odd(nn.GroupNorm(2, 4)),
    "'between' \\(ConvTranspose2d": lambda: Odd(nn.ConvTranspose2d(4, 4, 3, padding=1)),
    "'between' \\(Conv2d.*groups=2": lambda: Odd(nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "feed into SigmoidBackward0": lambda: Odd(torch.sigmoid),
    "feed into a sum with the parameter 'between.shift'": lambda: Odd(Shifted(operator.add)),
    "feed into a sum with the parameter 'between.shift', where": lambda: Odd(
        Shifted(lambda hidden, shift: hidden - 2 * shift, 1)
    ),
    "feed into FlipBackward0": lambda: Odd(lambda hidden: hidden.flip(1)),
    "feed into PermuteBackward0": lambda: Odd(lambda hidden: hidden.permute(0, 1, 3, 2)),
    "feed into ChannelShuffleBackward0": lambda: Odd(nn.ChannelShuffle(2)),
    "feed into SplitOp": lambda: Odd(lambda hidden: torch.cat(hidden.split(2, 1)[::-1], 1)),
    "first in layer 'second': before it, channels are shifted": lambda: Odd(lambda hidden: hidden + 1),
    "first in layer 'second': before it, channels": lambda: Odd(lambda hidden: hidden - hidden.mean(1, keepdim=True)),
    "does not run: its code may contain a fixed number of channels .*invalid for input": lambda: Odd(
        lambda hidden: hidden.view(-1, 4, 32, 32)
    ),
    "does not run in training mode: .* what runs only there; .*to have 4 channels, but got 3": OnlyInTraining,
    "second.weight and between.weight are one parameter, which cannot shrink": tied,
}


@pytest.mark.parametrize("slopes", [1, 4])
def test_slopes_of_an_activation_go_with_their_channel(slopes: int) -> None:
    model = Odd(nn.Sequential(nn.PReLU(slopes), nn.BatchNorm2d(4), nn.PReLU(slopes)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 2)
    silence(model, optimizer, {"first": [1, 2], "between.1": [1, 2]})
    masked, of_masked = twin(model, optimizer)
    shrunk = shrink(model, optimizer)
    assert shrunk.units["first"].tolist() == [0, 3]
    for one in (model.between[0], model.between[2]):
        assert one.num_parameters == len(one.weight) == min(slopes, 2)
    for _ in range(2):
        assert_same(model(batch(7)[0]), masked(batch(7)[0]))
        train(model, optimizer, 1)
        train(masked, of_masked, 1)
    kept = [0, 3] if slopes == 4 else [0]
    assert_same(model.between[0].weight, masked.between[0].weight[kept])


def test_one_slope_of_all_channels_hides_none_of_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.PReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(900, 6), nn.PReLU(), nn.Linear(6, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 1)
    silence(model, optimizer, {"0": [1, 2], "4": [5]})
    masked, of_masked = twin(model, optimizer)
    shrink(model, optimizer)
    assert [tuple(model[layer].weight.shape) for layer in (0, 1, 4, 6)] == [(2, 1, 3, 3), (1,), (5, 450), (4, 5)]
    train(model, optimizer, 2)
    train(masked, of_masked, 2)
    assert_same(model(batch(7)[0]), masked(batch(7)[0]))
    assert_same(model[1].weight, masked[1].weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_has_diverged_shrinks_as_any_other(value: float) -> None:
    model = Odd(nn.ReLU())
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = value
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"first": [1]})
    masked = copy.deepcopy(model)
    shrink(model)
    assert model.first.weight.shape == (3, 1, 3, 3)
    torch.testing.assert_close(model(batch(7)[0]), masked(batch(7)[0]), equal_nan=True)


@pytest.mark.parametrize("message", UNKNOWN)
def test_what_cannot_be_followed_is_refused_by_name_and_left_alone(message: str) -> None:
    model = UNKNOWN[message]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, 1)
    silence(model, optimizer, {"first": [1]})
    _is_left_alone(model, optimizer, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_digits_hide_no_other_network(dtype: torch.dtype) -> None:
    model, inputs = Odd(lambda hidden: hidden * hidden.mean(1, keepdim=True)), torch.randn(2, 1, 8, 8).to(dtype)
    model.first, model.second = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 4, 1)
    model.to(dtype)
    silence(model, torch.optim.SGD(model.parameters(), 0.1), {"first": [5]})
    with pytest.raises(ValueError, match="computes something else than the masked one, first in layer 'second'"):
        shrink(model, inputs=inputs)
    model.between = nn.Tanh()
    masked = copy.deepcopy(model)
    shrink(model, inputs=inputs)
    assert model.first.weight.shape == (63, 1, 3, 3)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    torch.testing.assert_close(model(inputs), masked(inputs))


def _is_left_alone(model: nn.Module, optimizer: torch.optim.Optimizer, message: str, **inputs: Tensor) -> None:
    parameters, mode = list(model.parameters()), model.training
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), parameter_masks(model), str(model)))
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        shrink(model, optimizer, **inputs)
    now = (model.state_dict(), optimizer.state_dict(), parameter_masks(model), str(model))
    torch.testing.assert_close(now[:3], state[:3], rtol=0, atol=0)
    assert now[3] == state[3]
    assert all(map(operator.is_, model.parameters(), parameters))
    assert model.training == mode
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_in_the_way_is_said() -> None:
    def fresh(optimizer_class: type = torch.optim.SGD, **settings: object) -> Trained:
        model = Odd(nn.ReLU())
        optimizer = optimizer_class(model.parameters(), 0.1, **settings)
        inputs, _ = batch(0)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = model(inputs).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        silence(model, optimizer, {"first": [1]})
        return model, optimizer

    _is_left_alone(*fresh(torch.optim.Adafactor), "Adafactor keeps 'row_var' of first.weight in a shape of its own")
    _is_left_alone(*fresh(torch.optim.LBFGS), "LBFGS keeps '.*' of .* in a shape of its own")
    model, optimizer = fresh()
    _is_left_alone(model, optimizer, "does not run on the inputs: pass shrink.* inputs", inputs=torch.zeros(2, 3, 8, 8))
    prune.random_unstructured(model.second, "weight", 0.5)
    _is_left_alone(model, optimizer, r"second.weight_orig is turned into the layer's own .*utils.prune.remove")
    with pytest.raises(ValueError, match=r"which has no 2D convolution .*: pass inputs=<a batch that it takes>"):
        shrink(nn.Linear(3, 2), None)
    with pytest.warns(FutureWarning, match="deprecated"):
        normed = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 2, 1)))
    with pytest.raises(ValueError, match=r"^0.weight_g is turned into the layer's own"):
        shrink(normed, None)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 1)))
    made_permanent = (
        r"^0.parametrizations.weight.original0 is turned into .* torch.nn.utils.parametrize.remove_parametriz"
    )
    with pytest.raises(ValueError, match=made_permanent):
        shrink(normed, None)
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet: run a batch through the model first"):
        shrink(nn.Sequential(nn.LazyConv2d(2, 1)))


def test_a_transformer_is_refused() -> None:
    torch.set_default_dtype(torch.float32)
    model = VisionTransformer(image_size=32, patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    silence(model, optimizer, {"conv_proj": [0]})
    _is_left_alone(model, optimizer, "filters of layer 'conv_proj' feed into PermuteBackward0")


def test_torch_pruning_is_asked_for_by_command(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained("vgg13")
    Pruner(model, optimizer, "magnitude").prune(0.5)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"^shrink\(\) needs torch-pruning.*: pip install torch-pruning$"):
        shrink(model, optimizer)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_a_compiled_network_several_optimizers_and_frozen_parameters_shrink() -> None:
    model, _ = trained("vgg13")
    model.features[2].requires_grad_(False)
    convolutional = torch.optim.SGD(model.features.parameters(), 0.05, momentum=0.9)
    linear = torch.optim.AdamW(model.classifier.parameters(), 0.01)
    compiled = torch.compile(model, backend="eager")

    def step(network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        network.zero_grad()
        F.cross_entropy(network(batch(0)[0]), batch(0)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()

    step(compiled, [convolutional, linear])
    silence(model, convolutional, {"features.0": [0, 3], "features.2": [0, 3]})
    masked, of_masked = copy.deepcopy(model), []
    for parameters, optimizer in ((masked.features, convolutional), (masked.classifier, linear)):
        of_masked.append(type(optimizer)(parameters.parameters(), 0.1))
        of_masked[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shrink(compiled, [convolutional, linear])
    assert [parameter.requires_grad for parameter in model.features[2].parameters()] == [False, False]
    assert len(model.features[2].weight) == 3
    for _ in range(2):
        step(compiled, [convolutional, linear])
        step(masked, of_masked)
    assert_same(compiled(batch(7)[0]), masked(batch(7)[0]))


def test_latency_is_the_median_of_passes_after_a_warm_up() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.waits = iter([0.5, 0.5, 0.01, 0.1, 0.01, 0.0, 0.01])
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, inputs: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            time.sleep(next(self.waits))
            return inputs * self.scale

    model = Slow()
    assert 0.01 <= latency(model, torch.ones(1), repeats=5, warm_up=2) < 0.1
    assert model.training
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        latency(model, torch.ones(1), repeats=0)
