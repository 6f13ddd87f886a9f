"""Gradient flow is predicted of optimizers that step along the gradient; of others the exact relations alone hold."""

import numpy as np
import pytest
import torch
from torch import nn

import analysis
import figures
from analysis.norm import network_norm
from dynamics import Recorder, open_run


class Lion(torch.optim.Optimizer):
    """Someone's optimizer with moments: it steps along a sign."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


class Plain(Lion):
    """Someone's optimizer of which nothing is known but its learning rate."""

    def __init__(self, params, lr):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr})


class Child(torch.optim.SGD):
    """It steps as SGD does."""


class OtherChild(torch.optim.SGD):
    """It has a rate for each layer, as LARS has."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad *= parameter.norm() / parameter.grad.norm()
        super().step()


class Wrapper:
    """It goes back half of each step, as an average would, so that SGD's learning rate is not its own."""

    def __init__(self, inner):
        self.optimizer, self.param_groups, self.zero_grad = inner, inner.param_groups, inner.zero_grad

    @torch.no_grad()
    def step(self, closure=None):
        before = [one.clone() for group in self.param_groups for one in group["params"]]
        self.optimizer.step()
        for now, then in zip([one for group in self.param_groups for one in group["params"]], before, strict=True):
            now.lerp_(then, 0.5)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.5), 0.2), "asgd": (lambda p: torch.optim.ASGD(p, 0.1), np.nan),
    "child": (lambda p: Child(p, 0.1), 0.1), "other child": (lambda p: OtherChild(p, 0.1), np.nan),
    "wrapper": (lambda p: Wrapper(torch.optim.SGD(p, 0.1)), np.nan),
    "plain": (lambda p: Plain(p, 0.1), np.nan), "adamw": (lambda p: torch.optim.AdamW(p, 0.1), np.nan),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), np.nan), "lion": (lambda p: Lion(p, 0.1), np.nan),
}  # fmt: skip


def record(path, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = make(model.parameters())
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(6)]
    with Recorder(path, model, optimizer, curvature_every=2) as recorder:
        for x, y in recorder.watch(batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return open_run(path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_has_a_flow_time_where_it_goes_along_the_gradient(tmp_path, name) -> None:
    make, flow_step = OPTIMIZERS[name]
    run = record(tmp_path / "run.zarr", make)
    np.testing.assert_allclose(run["steps"].flow_step, flow_step)
    np.testing.assert_allclose(run["steps"].flow_time[1:], flow_step * np.arange(1, 6))
    decrease = analysis.loss_decrease(run)
    assert np.isfinite(decrease[["measured", "first_order", "second_order"]].to_array()).all()
    assert np.isfinite(decrease.first_order_flow).all() == np.isfinite(flow_step)


def test_what_needs_a_flow_says_so_and_the_rest_is_drawn(tmp_path) -> None:
    make, _ = OPTIMIZERS["adamw"]
    run = record(tmp_path / "run.zarr", make)
    for of_the_flow in (analysis.norm_rate, analysis.network_norm_rate, analysis.stability):
        with pytest.raises(analysis.MissingQuantityError, match="no step here has a flow time"):
            of_the_flow(run)
    assert list(network_norm(run)) == ["param_sqnorm"]
    assert analysis.agreement(run).relation.values.tolist() == ["loss decrease"]
    residual = analysis.norm_balance(run).residual.isel(step=slice(-1))
    np.testing.assert_allclose(residual, 0, atol=1e-5)
    assert len(figures.draw("norms", {"alone": run}).axes) == 1
    both = {"alone": run, "other": record(tmp_path / "other.zarr", OPTIMIZERS["sgd"][0])}
    left, right = figures.draw("norms", both).axes
    colours = [{line.get_label(): line.get_color() for line in ax.lines} for ax in (left, right)]
    assert colours[1].items() <= colours[0].items()
    assert len(colours[0]) == 2


def record_in_turns(path, model, optimizers, curvature_every):
    """A training in which one optimizer after the other takes a step."""
    with Recorder(path, model, optimizers, curvature_every=curvature_every) as recorder:
        for number in range(24):
            batch = torch.randn(8, 4), torch.randint(3, (8,))
            recorder.observe(batch)
            model.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizers[number % len(optimizers)].step()
    return open_run(path)


@pytest.mark.parametrize("alternating", [False, True])
def test_layers_that_stay_have_no_flow_time_to_share_with_those_of_another_optimizer(tmp_path, alternating) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(alternating)
    parts = [model[2], model[0]][: 1 + alternating]
    optimizers = [torch.optim.Adam(part.parameters(), 0.1) for part in parts]
    run = record_in_turns(tmp_path / "run.zarr", model, optimizers, curvature_every=1)
    assert (run["steps"].flow_step == 0).any()
    for of_the_flow in (analysis.norm_rate, analysis.network_norm_rate, analysis.layer_norm_rate, analysis.stability):
        with pytest.raises(analysis.MissingQuantityError, match="no step here has a flow time"):
            of_the_flow(run)


def test_a_layer_without_flow_time_has_no_velocity_beside_one_that_has(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizers = [torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.Adam(model[2].parameters(), 0.1)]
    run = record_in_turns(tmp_path / "run.zarr", model, optimizers, curvature_every=0)
    rate = analysis.norm_rate(run).measured
    steps = run["steps"].isel(layer=0, step=slice(None, None, 2))
    moved = (2 * steps.param_update + steps.update_sqnorm) / 0.1
    np.testing.assert_allclose(rate.isel(layer=0, step=slice(None, None, 2)), moved, rtol=1e-5)
    assert rate.isel(layer=1).isnull().all()


def test_condensed_runs_without_flow_time_are_of_the_whole_network(tmp_path) -> None:
    runs = {str(seed): record(tmp_path / f"{seed}.zarr", OPTIMIZERS["adamw"][0]) for seed in range(3)}
    condensed = analysis.expand(analysis.condense(runs, tmp_path / "all.zarr.zip"))
    assert condensed["2"]["steps"].layer.values.tolist() == ["network"]


def test_layers_of_different_learning_rates_have_no_common_stability(tmp_path) -> None:
    def make(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": others}], lr=0.1)

    run = record(tmp_path / "run.zarr", make)
    assert run["steps"].flow_step.isnull().any()
    with pytest.raises(analysis.MissingQuantityError, match="the layers' differ at every measured step"):
        analysis.stability(run)


def test_a_multiple_of_the_loss_has_the_flow_of_the_loss(tmp_path) -> None:
    """The same training by a sum over the batch at an eighth of the rate."""
    found = []
    for times in (1, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.2 / times)
        batches = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(6)]
        with Recorder(tmp_path / f"{times}.zarr", model, optimizer, curvature_every=2) as recorder:
            for x, y in recorder.watch(batches):
                optimizer.zero_grad()
                (times * nn.functional.cross_entropy(model(x), y)).backward()
                optimizer.step()
        run = open_run(tmp_path / f"{times}.zarr")
        found.append(analysis.loss_decrease(run).merge(analysis.stability(run)))
    for name in ("measured", "first_order", "first_order_flow", "second_order_flow", "stability"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(found[0].first_order_flow, found[0].first_order, rtol=1e-9)
