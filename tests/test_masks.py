"""What is pruned is exactly zero for good, and what remains does not notice anything else."""

import copy
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import smooth_network
from prunable import NETWORKS, OPTIMIZERS, batch, goes_with, parameters_with, train, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from dynamics.models import VGG, MobileNet
from dynamics.network.layers import Layers
from dynamics.network.masks import apply_masks, lift_masks, parameter_masks
from dynamics.pruning import Pruner


def gone(model: nn.Module, alive: Mapping[str, Tensor], attribute: str = "data") -> list[Tensor]:
    """The entries of each parameter (or of its gradient) that belong to filters that are not alive."""
    names = parameters_with(model).items()
    return [getattr(model.get_parameter(name), attribute)[~alive[layer]] for layer, own in names for name in own]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_filters_stay_at_exactly_zero(name: str, optimizer_name: str) -> None:
    model, optimizer = trained(name, optimizer_name)
    pruner = Pruner(model, optimizer, "gradient_norm_increase")
    for sparsity in (0.3, 0.5):
        pruner.prune(sparsity, [batch(100)])
        train(model, optimizer, 3)
        parts = gone(model, pruner.alive)
        assert sum(map(len, parts)) > 0
        assert all((part == 0).all() for part in parts)
        assert all((grad == 0).all() for grad in gone(model, pruner.alive, "grad"))
    for layer, names in parameters_with(model).items():
        for parameter in map(model.get_parameter, names):
            assert (parameter.grad[pruner.alive[layer]] != 0).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_silenced_filter_puts_out_nothing(name: str) -> None:
    model, optimizer = trained(name)
    pruner = Pruner(model, optimizer, "magnitude")
    pruner.prune(0.5)
    train(model, optimizer, 2)
    outputs: dict[tuple[str, str], Tensor] = {}
    for layer, modules in goes_with(model).items():
        for module in modules:
            model.get_submodule(module).register_forward_hook(
                lambda module, inputs, output, key=(layer, module): outputs.update({key: output})
            )
    for mode in (True, False):
        model.train(mode)(batch(0)[0])
        assert outputs
        for (layer, _), output in outputs.items():
            assert (output[:, ~pruner.alive[layer]] == 0).all()
            assert (output[:, pruner.alive[layer]] != 0).any()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_network_computes_what_one_zeroed_by_hand_does(name: str, mode: str) -> None:
    model, optimizer = trained(name)
    by_hand = copy.deepcopy(model)
    alive = Pruner(model, optimizer, "magnitude").prune(0.5).alive
    with torch.no_grad():
        for layer, names in parameters_with(by_hand).items():
            for parameter in names:
                for index in (~alive[layer]).nonzero().flatten().tolist():
                    by_hand.get_parameter(parameter)[index] = 0
    inputs = batch(7)[0]
    logits, expected = (network.train(mode == "train")(inputs) for network in (model, by_hand))
    assert torch.equal(logits, expected)


def cut(model: nn.Module, alive: Mapping[str, Tensor]) -> nn.Module:
    """A smaller network that has only the filters that are alive, with their weights and statistics."""
    counts = [int(kept.sum()) for kept in alive.values()]
    if isinstance(model, VGG):
        widths, left = [], iter(counts)
        for module in model.features:
            if isinstance(module, nn.Conv2d | nn.MaxPool2d):
                widths.append("M" if isinstance(module, nn.MaxPool2d) else next(left))
        small: nn.Module = VGG(widths, num_classes=4, in_channels=1)
    else:
        strides = [block.depthwise.stride[0] for block in model.blocks]
        small = MobileNet(counts[0], list(zip(counts[1:], strides, strict=True)), num_classes=4, in_channels=1)
    state, incoming = model.state_dict(), torch.tensor([True])
    for layer, modules in goes_with(model).items():
        state[f"{layer}.weight"] = state[f"{layer}.weight"][:, incoming]
        for name in [name for name in state if name.rpartition(".")[0] in modules and state[name].ndim]:
            state[name] = state[name][alive[layer]]
        incoming = alive[layer]
    state["classifier.weight"] = state["classifier.weight"][:, incoming]
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("name", ["vgg13", "mobilenet_v1"])
def test_masked_network_computes_what_a_smaller_one_does(name: str) -> None:
    model, optimizer = trained(name)
    alive = Pruner(model, optimizer, "magnitude").prune(0.4).alive
    train(model, optimizer, 2)
    small = cut(model, alive)
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for mode in (True, False):
        logits, expected = (network.train(mode)(batch(7)[0]) for network in (model, small))
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_state_of_what_remains_is_kept_to_the_bit(optimizer_name: str) -> None:
    model, optimizer = trained("vgg13", optimizer_name)
    before = copy.deepcopy({name: optimizer.state[parameter] for name, parameter in model.named_parameters()})
    alive = Pruner(model, optimizer, "magnitude").prune(0.5).alive
    for layer, names in parameters_with(model).items():
        for name in names:
            for key, value in optimizer.state[model.get_parameter(name)].items():
                if isinstance(value, Tensor) and value.ndim:
                    assert torch.equal(value[alive[layer]], before[name][key][alive[layer]])
                    assert (value[~alive[layer]] == 0).all()
                else:
                    assert value == before[name][key]


def test_what_is_shared_is_not_masked() -> None:
    model, optimizer = trained("resnet")
    Pruner(model, optimizer, "magnitude").prune(0.5)
    masked = set(parameter_masks(model))
    assert masked <= {name for names in parameters_with(model).values() for name in names}
    assert not masked & {"stem.weight", "norm.weight", "norm.bias", "classifier.weight", "classifier.bias"}


def linear() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2, bias=False)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def test_masks_only_grow() -> None:
    model, _ = linear()
    first = torch.tensor([[True, False, True], [True, True, True]])
    second = torch.tensor([[True, True, True], [False, True, True]])
    apply_masks(model, {"weight": first})
    apply_masks(model, {"weight": second})
    assert torch.equal(parameter_masks(model)["weight"], first & second)
    assert torch.equal(model.weight != 0, first & second)


def test_what_is_lifted_trains_again_from_zero() -> None:
    model, optimizer = linear()
    apply_masks(model, {"weight": torch.tensor([[True, False, True], [True, False, True]])})
    lift_masks(model, {"weight": torch.tensor([[False, True, False], [False, False, False]]), "bias": torch.ones(2)})
    assert torch.equal(parameter_masks(model)["weight"], torch.tensor([[True, True, True], [True, False, True]]))
    assert (model.weight[:, 1] == 0).all()
    F.mse_loss(model(torch.ones(1, 3)), torch.zeros(1, 2) - 9).backward()
    optimizer.step()
    assert model.weight[0, 1] != 0
    assert model.weight[1, 1] == 0


def test_not_a_number_goes_too() -> None:
    model, optimizer = linear()
    keep = torch.tensor([[False, True, True], [True, True, True]])
    model.weight.grad = torch.ones(2, 3)
    optimizer.step()
    with torch.no_grad():
        model.weight[0, 0], model.weight.grad[0, 0] = torch.nan, torch.inf
        optimizer.state[model.weight]["momentum_buffer"][0, 0] = torch.nan
    apply_masks(model, {"weight": keep}, optimizer)
    for tensor in (model.weight, model.weight.grad, optimizer.state[model.weight]["momentum_buffer"]):
        assert tensor[0, 0] == 0
        assert not torch.signbit(tensor[0, 0])
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_leaves_what_is_pruned_at_zero(value: float) -> None:
    model, optimizer = linear()
    apply_masks(model, {"weight": torch.tensor([[False, True, True], [True, True, True]])}, optimizer)
    model(torch.ones(1, 3)).backward(torch.tensor([[value, 1.0]]))
    assert model.weight.grad[0].isfinite().tolist() == [True, False, False]
    optimizer.step()
    assert model.weight[0, 0] == 0


def test_sparse_gradients_are_masked_as_others_are() -> None:
    """Those of an embedding, each with two entries of one row."""
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=sparse)
        apply_masks(model, {"weight": torch.rand(5, 3) > 0.5}, optimizer := torch.optim.SGD(model.parameters(), 0.1))
        model(torch.tensor([1, 3, 1])).square().sum().backward()
        optimizer.step()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-14, atol=0)
    assert (weights[1] == 0).any()


def test_masks_stay_out_of_the_state_dict() -> None:
    model, _ = linear()
    keys = list(model.state_dict())
    apply_masks(model, {"weight": torch.tensor([[False, True, True], [True, True, True]])})
    assert list(model.state_dict()) == keys


def test_a_rewound_network_is_as_pruned_as_it_was() -> None:
    """Weights are rewound, and so is the optimizer, whose momentum is of filters that were not pruned then."""
    model, optimizer = trained("vgg13")
    early = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    alive = Pruner(model, optimizer, "magnitude").prune(0.5).alive
    for network in (model, copy.deepcopy(model)):
        network.load_state_dict(early[0])
        for layer, names in parameters_with(model).items():
            for name in names:
                assert (network.get_parameter(name)[~alive[layer]] == 0).all()
                assert torch.equal(network.get_parameter(name)[alive[layer]], early[0][name][alive[layer]])
    optimizer.load_state_dict(early[1])
    apply_masks(model, parameter_masks(model), optimizer)
    train(model, optimizer, 2)
    assert all((part == 0).all() for part in gone(model, alive))


def test_a_pruned_network_that_is_sharded_loads_its_checkpoint_or_its_initial_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    initial, keep = copy.deepcopy(model.state_dict()), torch.arange(12).view(4, 3) % 2 == 0
    apply_masks(model, {"0.weight": keep})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.load_state_dict(model.state_dict())
        model(torch.ones(1, 3)).sum().backward()
        assert torch.equal(model[0].weight.grad.full_tensor() != 0, keep)
        set_model_state_dict(model, dict(initial), options=StateDictOptions(full_state_dict=True))
        assert torch.equal(model[0].weight.full_tensor(), initial["0.weight"] * keep)
    finally:
        dist.destroy_process_group()


def test_an_average_begun_before_the_pruning_goes_on() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = torch.optim.swa_utils.AveragedModel(model)
    apply_masks(model, {"0.weight": torch.tensor([[False, True, True], [True, True, True]])})
    model(torch.ones(4, 3) * torch.arange(4).view(4, 1))
    average.update_parameters(model)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    assert torch.equal(average.module[0].weight, model[0].weight)


def test_a_copy_is_masked_too() -> None:
    model, _ = linear()
    keep = torch.tensor([[False, True, True], [True, True, True]])
    apply_masks(model, {"weight": keep})
    twin = copy.deepcopy(model)
    assert torch.equal(parameter_masks(twin)["weight"], keep)
    for network in (model, twin):
        F.mse_loss(network(torch.ones(1, 3)), torch.zeros(1, 2) - 9).backward()
        assert torch.equal(network.weight.grad != 0, keep)


@pytest.mark.parametrize("how", ["copied", "thawed"])
def test_attention_s_projection_is_masked_too(how: str) -> None:
    """Its module is never called: what a forward pass has to do, that of the attention does."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for weight in weights.values():
        weight.requires_grad_(how == "copied")
    keep = {name: torch.rand_like(weight) > 0.5 for name, weight in weights.items()}
    apply_masks(model, keep)
    twin = copy.deepcopy(model).requires_grad_()
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(2):
        twin(torch.randn(3, 5, 8)).square().sum().backward()
        optimizer.step()
    assert "0.self_attn.out_proj.weight" in keep
    assert all(torch.equal(twin.get_parameter(name) != 0, kept) for name, kept in keep.items())


def test_several_optimizers_are_pruned_together() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))
    optimizers = [torch.optim.Adam(part.parameters(), 0.1) for part in (model[:2], model[2:])]
    batches = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 3)]

    def step() -> None:
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    pruned = Pruner(model, optimizers, "magnitude").prune(0.5, batches)
    step()
    gone = ~pruned.alive["0"]
    assert gone.any()
    assert not model[0].weight[gone].any()
    assert not optimizers[0].state[model[0].weight]["exp_avg"][gone].any()


def test_a_parameter_that_both_torch_and_a_mask_prune_keeps_what_both_keep() -> None:
    layer = nn.Linear(3, 2)
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 1, 0], [1, 1, 1]]))
    apply_masks(layer, parameter_masks(layer))  # as after loading a checkpoint
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 0], [1, 1, 1]]))
    (mask,) = parameter_masks(layer).values()
    assert torch.equal(mask, layer(torch.eye(3)).T - layer.bias[:, None] != 0)


def test_masks_may_be_on_other_devices_than_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers(smooth_network())
    with FakeTensorMode():  # tensors without numbers, which may be on a GPU that is not there
        mask = torch.ones(3, 5, dtype=torch.bool, device="cuda")
        monkeypatch.setattr("dynamics.network.layers.parameter_masks", lambda model: {"2.weight": mask})
        assert layers.kept().device.type == "cpu"
