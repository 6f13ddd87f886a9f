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


def columns(model: nn.Module, optimizer: Any, *, sparsity: float = 0.5, **settings: Any) -> Tensor:
    """Prune single weights by magnitude, as a user does; returns which of the first layer are gone."""
    pruned = Pruner(model, optimizer, "magnitude", granularity="weight", **settings).prune(sparsity)
    return ~pruned.alive["0"]


class Scheduled:
    """No optimizer at all: it keeps nothing, and steps by one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.9
        self.optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "wrapper without state": lambda model: Scheduled(sgd(model)),
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
        columns(model, optimizer, sparsity=0.7)
        train(model, optimizer, 1)
        assert len(said) == 1


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


def test_networks_that_are_gone_leave_no_hooks() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    for _ in range(5):
        apply_masks(network(), {"0.weight": torch.arange(36).view(6, 6) != 0}, optimizer)
        optimizer.step()
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_parameter_that_is_removed_or_made_of_others_is_not_looked_at() -> None:
    """Nor is what makes it run: a power iteration would be one more than the training's."""
    model = network()
    optimizer = sgd(model)
    apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) != 0, "0.bias": torch.arange(6) != 0}, optimizer)
    model[0].bias = None
    made: list[Tensor] = []

    class Making(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            made.append(weight)
            return weight

    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Making())
    made.clear()
    train(model, optimizer, 2)
    assert len(made) == 2


@pytest.mark.parametrize("given", [[], "a list", None])
def test_what_is_no_optimizer_is_refused_before_anything_is_pruned(given: Any) -> None:
    model = network()
    given = [sgd(model)] if given == "a list" else given
    with pytest.raises(TypeError, match="an optimizer, or what steps through one, has a state"):
        apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) != 0}, given)
    assert not parameter_masks(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_masks_of_other_types(dtype: torch.dtype) -> None:
    model = network()
    apply_masks(model, {"0.weight": (torch.arange(36).view(6, 6) != 0).to(dtype)}, sgd(model))
    assert (model[0].weight != 0).sum() == 35
    assert parameter_masks(model)["0.weight"].dtype is torch.bool


def test_state_of_which_nothing_is_pruned_may_be_quantised_and_truth_values_are_masked() -> None:
    model = network()
    optimizer = Keeping(model.parameters(), *QUANTISED["codes"][:2])
    train(model, optimizer, 2)
    optimizer.state[model[2].bias]["kept"] = torch.ones(3, dtype=torch.bool)
    whole = {"0.weight": torch.ones(6, 6, dtype=torch.bool)}
    apply_masks(model, whole | {"2.bias": torch.arange(3) != 0}, optimizer)
    assert optimizer.state[model[2].bias]["kept"].tolist() == [False, True, True]


def test_what_was_pruned_before_is_masked_again() -> None:
    """Even by a mask that prunes nothing, as the state may come from before."""
    model = network()
    optimizer = sgd(model)
    apply_masks(model, {"0.weight": torch.arange(36).view(6, 6) != 0}, optimizer)
    train(model, optimizer, 1)
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.ones(6, 6)
    apply_masks(model, {"0.weight": torch.ones(6, 6, dtype=torch.bool)}, optimizer)
    assert (optimizer.state[model[0].weight]["momentum_buffer"] == 0).sum() == 1


def test_a_name_that_is_projected_elsewhere_is_masked_where_it_is_not() -> None:
    """As GaLore keeps moments: of another shape where it projects a gradient, of the parameter's where it does not."""
    model = network()
    optimizer = sgd(model)
    train(model, optimizer, 2)
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.randn(2, 6)
    apply_masks(model, {"2.weight": torch.arange(18).view(3, 6) != 0}, optimizer)
    assert (optimizer.state[model[2].weight]["momentum_buffer"] == 0).sum() == 1


def test_state_is_dropped_of_this_network_alone_and_of_all_its_parameters() -> None:
    class Hybrid(torch.optim.SGD):
        """Steps some of its parameters by another optimizer, and knows one of another network."""

        def __init__(self, model: nn.Module, other: nn.Module) -> None:
            super().__init__(model[0].parameters(), 0.1, momentum=0.9)
            self.aux, self.partner = sgd(model[2]), sgd(other)

        def step(self, closure: Callable | None = None) -> None:
            super().step()
            self.aux.step()

    model, other = network(), network()
    optimizer = Hybrid(model, other)
    train(model, optimizer, 2)
    train(other, optimizer.partner, 2)
    columns(model, optimizer, keep_state=False)
    assert not optimizer.state
    assert not optimizer.aux.state
    assert len(optimizer.partner.state) == 4
