"""Single weights: exactly as many go as asked, from one ranking over all convolutions and linear layers, for good."""

import pytest
import torch
from prunable import NETWORKS, OPTIMIZERS, batch, train, trained
from torch import Tensor, nn

from dynamics.network.masks import parameter_masks
from dynamics.pruning import MEASURES, Pruner, share_left

BY_WEIGHT = [name for name, row in MEASURES.items() if not row.per_filter]


def layers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.weight for name, one in model.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)}


@pytest.mark.parametrize("measure", BY_WEIGHT)
def test_exactly_as_many_go_as_asked_and_none_comes_back(measure: str) -> None:
    model, optimizer = trained("mobilenet_v1")
    pruner = Pruner(
        model, optimizer, measure, granularity="weight", initial=NETWORKS["mobilenet_v1"]().state_dict()
    )  # fmt: skip
    total = sum(weight.numel() for weight in layers_of(model).values())
    gone = {layer: ~kept for layer, kept in pruner.alive.items()}
    assert gone.keys() == layers_of(model).keys()
    for number in range(1, 4):
        sparsity = 1 - share_left(0.9, 3, number)
        pruned = pruner.prune(sparsity, [batch(number)])
        left = sum(int(kept.sum()) for kept in pruned.alive.values())
        assert left == round(total * (1 - sparsity))
        assert pruned.sparsity == pytest.approx(1 - left / total, rel=1e-12)
        assert not any((gone[layer] & kept).any() for layer, kept in pruned.alive.items())
        assert all(kept.any() for kept in pruned.alive.values())
        gone = {layer: ~kept for layer, kept in pruned.alive.items()}
        train(model, optimizer, 1)
        assert all((weight[gone[layer]] == 0).all() for layer, weight in layers_of(model).items())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_weights_go_and_stay_at_exactly_zero(name: str, optimizer_name: str) -> None:
    model, optimizer = trained(name, optimizer_name)
    sizes = [weight.detach().abs().flatten() for weight in layers_of(model).values()]
    ranked = torch.cat([size.index_fill(0, size.argmax(), torch.inf) for size in sizes])  # the best of each layer stays
    alive = Pruner(model, optimizer, "magnitude", granularity="weight").prune(0.8).alive
    kept = torch.cat([values.flatten() for values in alive.values()])
    assert torch.equal(kept, ranked > ranked.sort().values[round(0.8 * len(ranked)) - 1])
    train(model, optimizer, 3)
    after = torch.cat([weight.detach().flatten() for weight in layers_of(model).values()])
    assert torch.equal(after != 0, kept)
    assert set(parameter_masks(model)) <= {f"{layer}.weight" for layer in layers_of(model)}


@pytest.mark.parametrize("count", range(8))
def test_ties_go_by_layer_and_index(count: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)
    alive = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", granularity="weight").prune(count / 10)
    order = [*range(3), *range(4, 9)]  # the last weight of each layer stays
    expected = torch.tensor([index not in order[:count] for index in range(10)])
    assert torch.equal(torch.cat([kept.flatten() for kept in alive.alive.values()]), expected)


def test_a_layer_is_never_emptied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", granularity="weight")
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(
        ValueError, match=r"asks for 9 more units to be pruned, but only 8 can be: every layer keeps .* weights"
    ):
        pruner.prune(0.9)
    assert all(map(torch.equal, model.parameters(), before))
    assert not parameter_masks(model)
    pruner.prune(0.8)
    assert [int(weight.count_nonzero()) for weight in model.parameters()] == [1, 1]


def test_a_floor_keeps_a_share_of_each_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", granularity="weight", floor=0.3).prune(0.5)
    assert [int(weight.count_nonzero()) for weight in model.parameters()] == [6, 14]


def test_no_tracing_is_needed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(4, 2, 3, groups=2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).flatten(1)[:, :3] if inputs.sum() > 0 else inputs.flatten(1)[:, :3]

    model = Branching()
    data = [(torch.rand(2, 4, 5, 5), torch.tensor([0, 1]))]
    pruning = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "snip", granularity="weight").prune(0.5, data)
    assert int(model.layer.weight.count_nonzero()) == 18
    assert pruning.cost.parameters == 18 + 2


def test_layers_may_be_left_out() -> None:
    model, optimizer = trained("vgg13")
    pruner = Pruner(model, optimizer, "magnitude", granularity="weight", protected=["classifier", "features.0"])
    assert not {"classifier", "features.0"} & pruner.prune(0.9).alive.keys()
    with pytest.raises(ValueError, match=r"protected contains names that are no modules of VGG: \['classifer'\]"):
        Pruner(model, optimizer, "magnitude", protected=["classifer"])


def test_shared_and_computed_weights_are_refused_by_name() -> None:
    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    for model, message in (
        (shared, "layer '0' shares its weight with '1'"),
        (computed, "layer '0' has a weight that is"),
    ):
        with pytest.raises(ValueError, match=message):
            Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude", granularity="weight")


@pytest.mark.parametrize("measure", BY_WEIGHT)
def test_a_model_may_be_one_layer(measure: str) -> None:
    """As logistic regression is: its layer has no name."""
    data = [(torch.randn(9, 10), torch.arange(9) % 3)]
    found = []
    for model, name in ((nn.Linear(10, 3), ""), (nn.Sequential(nn.Linear(10, 3)), "0")):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()).view_as(parameter).sin())
        initial = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        pruner = Pruner(model, None, measure, granularity="weight", initial=initial, seed=0)
        for sparsity in (0.3, 0.6):
            pruning = pruner.prune(sparsity, data)
        assert (pruning.cost.parameters, pruning.cost.multiply_adds) == (12 + 3, 12)
        found.append((pruning.scores[name], pruning.alive[name], model.get_submodule(name).weight != 0))
    assert all(map(torch.equal, *found))


def test_a_network_without_weights_to_prune_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="Sequential has no convolution or linear layer whose weights could be pruned"):
        Pruner(model, optimizer, "magnitude", granularity="weight")
