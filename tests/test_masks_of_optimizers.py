"""What optimizers keep of pruned parameters: masked wherever it is, or refused; and one that moves them is told of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from other_optimizers import Keeping, Lookahead, Shampoo, WithoutHooks
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from dynamics.pruning import Pruner, apply_masks, parameter_masks


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
        optimizer.step()


def columns(model: nn.Module, optimizer: Any, **settings: Any) -> Tensor:
    """Prune single weights by magnitude, as a user does; returns which of the first layer are gone."""
    pruned = Pruner(model, optimizer, "magnitude", granularity="weight", **settings).prune(0.5)
    return ~pruned.alive["0"]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "wrapper": lambda model: Lookahead(sgd(model)),
    "wrapper without hooks": lambda model: WithoutHooks(sgd(model)),
    "wrapper of a wrapper": lambda model: Lookahead(WithoutHooks(sgd(model))),
    "in a dictionary": lambda model: Keeping(
        model.parameters(), lambda now: {0: {"m": now}}, lambda kept: kept[0]["m"]
    ),
}


@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_pruned_stays_at_zero_wherever_its_state_is_kept(name: str, keep_state: bool) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 5)
    gone = columns(model, optimizer, keep_state=keep_state)
    kept = model[0].weight.detach().clone()
    train(model, optimizer, 5)
    assert gone.any()
    assert not model[0].weight[gone].any()
    assert (model[0].weight != kept)[~gone].all()


def test_a_matrix_that_is_as_large_as_a_square_weight_is_not_masked() -> None:
    """Masked it would be singular, and the training of what remains would end."""
    model = network()
    optimizer = Shampoo(model.parameters(), {})
    train(model, optimizer, 3)
    kept = optimizer.state[model[0].weight]["preconditioner"].clone()
    twin, other = copy.deepcopy((model, kept))
    with pytest.warns(
        UserWarning, match=r"pruned entries of '0.weight' are not zero after a step of Shampoo, the larg"
    ):
        columns(model, optimizer)
        assert torch.equal(optimizer.state[model[0].weight]["preconditioner"], other)
        train(model, optimizer, 1)
    assert model[0].weight.isfinite().all()
    assert not torch.equal(model[0].weight, twin[0].weight)


QUANTISED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "codes": (  # 255 of them, of which number 127 is zero
        lambda now: (now.clamp(-1, 1) * 127 + 127).round().to(torch.uint8),
        lambda kept: (kept.double() - 127) / 127,
        "uint8",
    ),
    "a subclass": (lambda now: TwoTensor(now, now.clone()), lambda kept: kept.a, "TwoTensor"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_state_is_refused_before_anything_is_pruned(kind: str) -> None:
    model, (keep, take, said) = network(), QUANTISED[kind]
    optimizer = Keeping(model.parameters(), keep, take)
    train(model, optimizer, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"Keeping keeps 'kept' of '0.weight' as {said}, .*keep_state=False"):
        columns(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not parameter_masks(model)
    gone = columns(model, optimizer, keep_state=False)
    assert not model[0].weight[gone].any()


def test_an_optimizer_that_moves_what_is_pruned_is_told_of_once_and_can_be_mended() -> None:
    model = network()
    optimizer = Keeping(model.parameters(), lambda now: [now], lambda kept: kept[0])  # in a list: nobody finds it
    train(model, optimizer, 3)
    gone = columns(model, optimizer)
    with pytest.warns(UserWarning, match=r"pruned entries of '0.weight' are not zero after a step of Keeping") as said:
        for _ in range(9):
            train(model, optimizer, 1)
            assert model[0].weight[gone].any()
            apply_masks(model, parameter_masks(model), optimizer)
            assert not model[0].weight[gone].any()
    assert len(said) == 1
    assert said[0].filename == __file__
    assert not optimizer._optimizer_step_post_hooks


def test_a_wrapper_that_moves_it_later_is_told_of_by_its_own_name() -> None:
    model = network()
    optimizer = Lookahead(sgd(model))
    train(model, optimizer, 3)
    optimizer.state = {parameter: {"slow": [kept["slow"]]} for parameter, kept in optimizer.state.items()}
    columns(model, optimizer)
    for kept in optimizer.state.values():
        kept["slow"] = kept["slow"][0]
    with pytest.warns(UserWarning, match="are not zero after a step of Lookahead"):
        train(model, optimizer, 4)


def test_what_is_pruned_later_is_looked_at_anew() -> None:
    """At the 1st, 2nd and 4th step after each pruning, as someone moves it before the 7th and the last."""
    model = network()
    optimizer = sgd(model)
    (weight,) = [model[0].weight]
    apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) != 0}, optimizer)
    train(model, optimizer, 6)
    weight.data[0, 0] = 1  # not looked at: the eighth would be
    train(model, optimizer, 1)
    apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) > 1}, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert not weight[0, :2].any()
    weight.data[0, 0] = 1
    with pytest.warns(UserWarning, match=r"1 of 2 pruned entries of '0.weight' are not zero after a step of SGD"):
        train(model, optimizer, 1)


def test_a_network_that_is_gone_is_not_looked_at() -> None:
    model = network()
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, 0.1)
    apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) != 0}, optimizer)
    del model
    weights[0].data[0, 0] = 1
    optimizer.step()
