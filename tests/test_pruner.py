"""Exactly as many filters go as asked, the lowest first, and none comes back."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from prunable import NETWORKS, batch, train, trained
from torch import nn

from dynamics.models import build
from dynamics.network.masks import parameter_masks
from dynamics.pruning import MEASURES, Pruner, apply_masks, share_left


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_exactly_as_many_go_as_asked_and_none_comes_back(name: str, measure: str) -> None:
    model, optimizer = trained(name, steps=1)
    pruner = Pruner(model, optimizer, measure, initial=NETWORKS[name]().state_dict())
    total = left = sum(len(kept) for kept in pruner.alive.values())
    gone = {layer: ~kept for layer, kept in pruner.alive.items()}
    for number in range(1, 5):
        sparsity = 1 - share_left(0.6, 4, number)
        pruned = pruner.prune(sparsity, [batch(number)])
        before, left = left, sum(int(kept.sum()) for kept in pruned.alive.values())
        assert before - left == before - round(total * (1 - sparsity)) > 0
        assert pruned.sparsity == pytest.approx(1 - left / total, rel=1e-12)
        assert not any((gone[layer] & kept).any() for layer, kept in pruned.alive.items())
        gone = {layer: ~kept for layer, kept in pruned.alive.items()}
        assert all(kept.any() for kept in pruned.alive.values())
        train(model, optimizer, 1)
    assert left == round(total * 0.4)
    if name == "resnet":
        assert pruner.alive["stem"].all()
        assert pruned.scores["stem"].isfinite().all()


@pytest.mark.parametrize("measure", ["magnitude", "gradient_norm_increase", "taylor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_lowest_scores_go(name: str, measure: str) -> None:
    model, optimizer = trained(name)
    pruned = Pruner(model, optimizer, measure, floor=0).prune(0.3, [batch(9)])
    free = [layer for layer in pruned.alive if layer != "stem" or name != "resnet"]
    # Each layer keeps one filter: its best one is not in the ranking.
    best = {layer: int(pruned.scores[layer].argmax()) for layer in free}
    ranked = [
        (float(score), bool(kept))
        for layer in free
        for index, (score, kept) in enumerate(zip(pruned.scores[layer], pruned.alive[layer], strict=True))
        if index != best[layer]
    ]
    assert max(score for score, kept in ranked if not kept) <= min(score for score, kept in ranked if kept)
    assert all(pruned.alive[layer][index] for layer, index in best.items())


def test_what_is_gone_is_not_asked_for_again() -> None:
    model, optimizer = trained("vgg13")
    pruner = Pruner(model, optimizer, "magnitude")
    alive = pruner.prune(0.5).alive
    for sparsity in (0.5, 0.2, 0.0):
        said = (
            pytest.warns(UserWarning, match="nothing is pruned: .* includes earlier prunings")
            if sparsity
            else nullcontext()
        )
        with said:
            again = pruner.prune(sparsity)
        assert all(torch.equal(kept, alive[layer]) for layer, kept in again.alive.items())
        assert again.sparsity == pytest.approx(0.5, abs=0.01)


def two_layers(first: list[float], second: list[float]) -> nn.Sequential:
    """Two 1 × 1 convolutions whose filters have the given magnitudes, and a head."""
    model = nn.Sequential(
        nn.Conv2d(1, len(first), 1, bias=False),
        nn.Conv2d(len(first), len(second), 1, bias=False),
        nn.Flatten(),
        nn.Linear(len(second), 2),
    )
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


@pytest.mark.parametrize("count", range(7))
def test_ties_go_by_layer_and_index(count: int) -> None:
    alive = prune_by_magnitude(two_layers([1.0] * 4, [1.0] * 5), count / 9, 0.05)
    order = [("0", 0), ("0", 1), ("0", 2), ("1", 0), ("1", 1), ("1", 2), ("1", 3)]  # the last of each layer stays
    assert alive == {
        layer: [(layer, index) not in order[:count] for index in range(filters)]
        for layer, filters in (("0", 4), ("1", 5))
    }


def test_the_floor_keeps_the_best_of_a_layer() -> None:
    alive = prune_by_magnitude(two_layers([0.1, 0.4, 0.2, 0.3], [8.0, 5.0, 7.0, 6.0]), 0.5, 0.5)
    assert alive == {"0": [False, True, False, True], "1": [True, False, True, False]}


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All that a pruning could change."""
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *momentum, *gradients)]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, r"sparsity must be in \[0, 1\), got 1.0"),
        (-0.1, r"sparsity must be in \[0, 1\), got -0.1"),
        (float("nan"), r"sparsity must be in \[0, 1\), got nan"),
        (
            0.99,
            r"^sparsity 0.99 asks for \d+ more units to be pruned, but only \d+ can be: .* keeps 5% of its filters",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(sparsity: float, message: str) -> None:
    model, optimizer = trained("resnet")
    pruner = Pruner(model, optimizer, "loss_preservation")
    before, buffers = state(model, optimizer), dict(model.named_buffers()).keys()
    with pytest.raises(ValueError, match=message):
        pruner.prune(sparsity, [batch(0)])
    assert all(map(torch.equal, state(model, optimizer), before))
    assert dict(model.named_buffers()).keys() == buffers
    assert all(kept.all() for kept in pruner.alive.values())


@pytest.mark.parametrize("measure", ["magnitude", "loss_preservation", "gradient_norm_increase"])
def test_a_diverged_network_is_not_ranked_and_left_alone(measure: str) -> None:
    model, optimizer = trained("vgg13")
    with torch.no_grad():
        model.features[3].weight[0, 0, 0, 0] = torch.nan
    pruner = Pruner(model, optimizer, measure)
    before = [tensor.nan_to_num(9.0) for tensor in state(model, optimizer)]
    with pytest.raises(ValueError, match=f"the scores of {measure} are not finite in layer .*diverged"):
        pruner.prune(0.5, [batch(0)])
    assert all(map(torch.equal, [tensor.nan_to_num(9.0) for tensor in state(model, optimizer)], before))
    assert all(kept.all() for kept in pruner.alive.values())


def test_bad_arguments_are_said() -> None:
    model, optimizer = trained("vgg13", steps=1)
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got 2"):
        Pruner(model, optimizer, "magnitude", floor=2)
    with pytest.raises(ValueError, match="unknown measure 'magic': choose one of magnitude"):
        Pruner(model, optimizer, "magic")
    with pytest.raises(ValueError, match="taylor needs data"):
        Pruner(model, optimizer, "taylor").prune(0.5)
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        Pruner(model, torch.optim.SGD(build("vgg13", num_classes=4, width=0.125).parameters(), 0.1), "magnitude")
    with pytest.raises(ValueError, match="mode 'eval' or 'train', got 'filter', 'test'"):
        Pruner(model, optimizer, "taylor", mode="test")
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got '0.5'"):
        Pruner(model, optimizer, "magnitude").plan("0.5")
    for batches in (
        torch.zeros(2, 1, 32, 32),
        [torch.zeros(2, 1, 32, 32)],
        (torch.zeros(3, 1, 32, 32), torch.zeros(3)),
    ):
        with pytest.raises(
            ValueError, match=r"\(inputs, labels\), got a Tensor: pass a list of such batches; for another"
        ):
            Pruner(model, optimizer, "taylor").plan(0.5, batches)
    one, other = (Pruner(model, optimizer, "magnitude", protected=names) for names in ("features.0", ["features.0"]))
    assert one.alive.keys() == other.alive.keys() != Pruner(model, optimizer, "magnitude").alive.keys()
    for sparsity, rounds, number, message in (
        (1.0, 1, 1, r"sparsity must be in \[0, 1\), got 1.0"),
        (0.5, 0, 0, "rounds must be 1 or more, got 0"),
        (0.5, 2, 3, "round must be from 0 to rounds, got round 3 of 2"),
        (0.5, 2, -1, "round must be from 0 to rounds, got round -1 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            share_left(sparsity, rounds, number)


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


def test_it_says_in_a_line_what_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "magnitude")
    pruning = pruner.prune(0.25)
    assert repr(pruning) == "<Pruning by magnitude: 6 of 8 filters left in 1 layer, 25.0% pruned>"
    assert repr(pruner) == "<Pruner by magnitude: 6 of 8 filters left in 1 layer>"
    assert repr(MEASURES["loss_preservation"]) == "<loss_preservation: Σ|θg|>"


def test_of_a_loss_that_it_cannot_evaluate_importance_says_what_it_is_of() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 9))
    texts = [(torch.randint(9, (4, 7)), torch.randint(9, (4, 7)))]
    pruner = Pruner(model, torch.optim.SGD(model.parameters(), 0.1), "loss_preservation", granularity="weight")
    with pytest.raises(
        ValueError, match=r"importance is measured with the mean cross-entropy .* failed with .*: Expected target"
    ):
        pruner.plan(0.3, texts)


class Hungry(nn.Linear):
    """It needs more memory than there is."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")


def test_what_one_s_own_loss_raises_is_left_as_it_is() -> None:
    def broken(model: nn.Module, batch: object) -> torch.Tensor:
        raise IndexError("of one's own")

    settings = {"measure": "taylor", "granularity": "weight"}
    with pytest.raises(IndexError, match=r"^of one's own$"):
        Pruner(nn.Linear(3, 2), None, **settings, objective=broken).plan(0.3, [batch(0)])
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):  # loops that catch it go on with smaller batches
        Pruner(Hungry(3, 2), None, **settings).plan(0.3, [batch(0)])


def test_nothing_need_train_on() -> None:
    one, _ = trained("vgg13", steps=1)
    other = copy.deepcopy(one)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    found = [Pruner(*given, "magnitude").prune(0.5).alive for given in ((one, None), (other, optimizer))]
    assert all(torch.equal(alive, found[1][name]) for name, alive in found[0].items())
    for parameter, same in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same)


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_an_empty_parameter_costs_nothing(granularity: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    whole = Pruner(model, None, "magnitude", granularity=granularity).plan(0.3, [(torch.zeros(2, 6), torch.zeros(2))])
    model.empty = nn.Parameter(torch.zeros(0, 3))
    found = Pruner(model, None, "magnitude", granularity=granularity).plan(0.3, [(torch.zeros(2, 6), torch.zeros(2))])
    assert found.attributes == whole.attributes


def test_what_another_pruner_took_is_gone() -> None:
    model, optimizer = trained("vgg13")
    pruner, other = Pruner(model, optimizer, "random", seed=0), Pruner(model, optimizer, "magnitude")
    gone = {layer: ~kept for layer, kept in other.prune(0.3).alive.items()}
    pruning = pruner.prune(0.5, [batch(1)])
    left = {layer: model.get_submodule(layer).weight.flatten(1).any(1) for layer in gone}  # that the network has
    assert sum(int(kept.sum()) for kept in left.values()) == round(0.5 * sum(map(len, left.values())))
    for layer, kept in left.items():
        assert torch.equal(pruning.alive[layer], kept)
        assert not (kept & gone[layer]).any()


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_masks_of_one_s_own_stay(granularity: str) -> None:
    model, optimizer = trained("vgg13")
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    own = {name: torch.rand(model.get_parameter(name).shape) > 0.1 for name in names}
    apply_masks(model, own, optimizer)
    pruner = Pruner(model, optimizer, "magnitude", granularity=granularity)
    for number, sparsity in enumerate((0.2, 0.4)):
        pruner.prune(sparsity, [batch(number)])
        train(model, optimizer, 1)
        masks = parameter_masks(model)
        for name, kept in own.items():
            assert not (masks[name] & ~kept).any()
            assert not model.get_parameter(name)[~kept].any()
