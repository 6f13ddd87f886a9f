"""Pruning what does nothing changes nothing: logits, the next update and the state of what remains, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prunable import NETWORKS, OPTIMIZERS, batch, parameters_with, trained
from torch import Tensor, nn

from dynamics.pruning import Pruner

SILENT = {"vgg13": ["features.3", "features.24"], "mobilenet_v1": ["stem", "blocks.3.pointwise"]}
SILENT["resnet"] = ["blocks.0.conv1", "blocks.1.conv2", "blocks.1.shortcut.0"]


def silence_by_hand(model: nn.Module, name: str) -> int:
    """Give the first filter of some layers γ = β = 0, so that its output is zero; how many these are."""
    own = parameters_with(model)
    with torch.no_grad():
        for layer in SILENT[name]:
            for parameter in own[layer]:
                if model.get_parameter(parameter).ndim == 1:
                    model.get_parameter(parameter)[0] = 0
    return len(SILENT[name])


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    inputs, labels = batch(77)
    optimizer.zero_grad()
    logits = model.train()(inputs)
    F.cross_entropy(logits, labels).backward()
    optimizer.step()
    return logits.detach()


def pair(name: str, optimizer_name: str) -> tuple[list[nn.Module], list[torch.optim.Optimizer], dict[str, Tensor]]:
    """The same training twice, once before its silent filters are pruned and once after; what is alive."""
    model, optimizer = trained(name, optimizer_name)
    count = silence_by_hand(model, name)
    twin = copy.deepcopy(model)
    its_optimizer = OPTIMIZERS[optimizer_name](list(twin.parameters()))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pruner = Pruner(twin, its_optimizer, "bn_scale")
    total = sum(len(kept) for kept in pruner.alive.values())
    alive = pruner.prune(count / total).alive
    assert {layer: (~kept).nonzero().flatten().tolist() for layer, kept in alive.items() if not kept.all()} == {
        layer: [0] for layer in SILENT[name]
    }
    return [model, twin], [optimizer, its_optimizer], alive


def remaining(model: nn.Module, alive: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The entries of tensors, one a parameter, that belong to no pruned filter."""
    layer_of = {name: layer for layer, names in parameters_with(model).items() for name in names}
    return [values[alive[layer_of[name]]] if name in layer_of else values for name, values in tensors.items()]


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_silent_filters_leaves_logits_and_the_next_update_as_they_are(name: str, optimizer_name: str) -> None:
    models, optimizers, alive = pair(name, optimizer_name)
    for mode in ("train", "eval"):
        logits = [copy.deepcopy(model).train(mode == "train")(batch(5)[0]) for model in models]
        assert torch.equal(*logits)
    before = [parameter.clone() for parameter in models[0].parameters()]
    assert torch.equal(*(step(*one) for one in zip(models, optimizers, strict=True)))
    values = [remaining(model, alive, dict(model.named_parameters())) for model in models]
    assert all(map(torch.equal, *values))
    assert not any(map(torch.equal, models[0].parameters(), before))


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_state_is_dropped_if_asked(optimizer_name: str) -> None:
    model, optimizer = trained("vgg13", optimizer_name)
    assert optimizer.state
    Pruner(model, optimizer, "magnitude", keep_state=False).prune(0.3)
    assert not optimizer.state
    kept, keeping = trained("vgg13", optimizer_name)
    Pruner(kept, keeping, "magnitude").prune(0.3)
    assert keeping.state
    step(kept, keeping)
