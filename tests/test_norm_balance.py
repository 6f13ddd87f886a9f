"""‖θ+Δθ‖² − ‖θ‖² = 2θᵀΔθ + ‖Δθ‖² for every optimizer; under SGD it splits into gradient, decay and the rest."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import Batch, plain_step, prune_row, recorded, smooth_network, vectors
from torch import Tensor, nn

from analysis import MissingQuantityError, network_norm_rate, norm_balance, norm_rate
from analysis.norm import _rolled
from dynamics import Recorder, open_run

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda theta: torch.optim.SGD(theta, 0.1),
    "momentum": lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda theta: torch.optim.Adam(theta, 0.01),
    "adamw": lambda theta: torch.optim.AdamW(theta, 0.01, weight_decay=0.1),
}


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.8  # a schedule
    return loss


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("step", [plain_step, clipped_step])
def test_norm_balance_closes(tmp_path: Path, make: Make, step: Callable[..., Tensor]) -> None:
    model = smooth_network()
    run = recorded(tmp_path / "run", model, make(list(model.parameters())), vectors(6), step, curvature_every=0)
    steps = run["steps"].to_dataset().load()
    change = 2 * steps.param_update + steps.update_sqnorm
    np.testing.assert_allclose(change[:-1], steps.param_sqnorm.diff("step"), atol=1e-14)
    final = [sum(p.detach().square().sum().item() for p in model[index].parameters()) for index in (0, 2)]
    np.testing.assert_allclose((steps.param_sqnorm + change)[-1], final, rtol=1e-14)
    balance = norm_balance(run)
    assert np.isfinite(balance.measured[:-1]).all()
    np.testing.assert_allclose(balance.residual[:-1], 0, atol=1e-14)
    parts = balance.gradient + balance.weight_decay + balance.momentum + balance.discretisation
    np.testing.assert_allclose(parts, balance.total, atol=1e-14)


def with_less_decay_each_time(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    loss = plain_step(model, optimizer, batch)
    optimizer.param_groups[0]["weight_decay"] *= 0.5
    return loss


def test_plain_gradient_descent_has_no_momentum_in_its_balance(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.05)
    run = recorded(tmp_path / "run", model, optimizer, vectors(6), with_less_decay_each_time, curvature_every=0)
    steps = run["steps"].to_dataset()
    np.testing.assert_allclose(steps.decay_sqnorm, 0.05 * 0.5**steps.step * steps.param_sqnorm, rtol=1e-14)
    by_hand = -2 * 0.1 * steps.param_grad - 2 * 0.1 * steps.decay_sqnorm
    np.testing.assert_allclose(2 * steps.param_update, by_hand, atol=1e-15)
    balance = norm_balance(run)
    np.testing.assert_allclose(balance.momentum, 0, atol=1e-15)
    assert float(np.abs(balance.weight_decay).max()) > 1e-4


def test_second_order_norm_rate_is_exact_for_plain_gradient_descent(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rate = norm_rate(recorded(tmp_path / "run", model, optimizer, vectors(6), curvature_every=0))
    np.testing.assert_allclose(rate.second_order, rate.measured, atol=1e-13)
    assert not np.allclose(rate.first_order, rate.measured, atol=1e-3)


def test_a_pruning_between_two_steps_is_not_taken_for_a_step(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            plain_step(model, optimizer, batch)
            if number == 1:
                with recorder.event("prune", probe=batches):
                    prune_row(model, "0.weight", 0)
    balance = norm_balance(open_run(tmp_path / "run"))
    assert np.isnan(balance.measured.values).all(axis=1).tolist() == [False, True, False, True]


def test_norm_rate_says_what_it_needs(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = recorded(tmp_path / "run", model, optimizer, vectors(2), quantities=["param_sqnorm"])
    lacks = r"/steps needs \['param_update'.*this run recorded \['epoch', 'layer', 'param_sqnorm'"
    with pytest.raises(ValueError, match=lacks):
        norm_rate(run)
    with pytest.raises(ValueError, match="window must be a number of steps >= 1, got 0"):
        norm_rate(run, window=0)


def test_no_window_reaches_over_a_pruning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(vectors(16))):
            if number == 9:
                with recorder.event("prune", probe=[batch]):
                    prune_row(model, "0.weight", 0)
            plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    single, averaged = norm_rate(run), norm_rate(run, window=5)
    for step in range(16):
        within = range(9) if step < 9 else range(9, 16)
        expected = single.sel(step=[other for other in within if abs(other - step) <= 2]).mean("step")
        for name in expected:
            np.testing.assert_allclose(averaged[name].sel(step=step), expected[name], rtol=1e-9)


def test_no_window_reaches_over_a_gap_in_the_record(tmp_path: Path) -> None:
    model = smooth_network()
    run = recorded(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), vectors(40), curvature_every=0)
    steps = run["steps"].to_dataset().load()
    parts = [steps.isel(step=slice(0, 14)), steps.isel(step=slice(26, 40))]
    gap = xr.DataTree.from_dict({"/steps": xr.concat(parts, "step")})
    alone = [network_norm_rate(xr.DataTree.from_dict({"/steps": part})).measured for part in parts]
    found = network_norm_rate(gap)
    assert found.attrs["window"] == 10
    np.testing.assert_allclose(found.measured, xr.concat(alone, "step"), rtol=1e-12)
    assert found.measured.notnull().all()


def test_velocities_in_different_times_are_not_added_up(tmp_path: Path) -> None:
    model = smooth_network()
    groups = [{"params": list(model[index].parameters()), "lr": rate} for index, rate in ((0, 0.1), (2, 0.01))]
    run = recorded(tmp_path / "run", model, torch.optim.SGD(groups), vectors(12), curvature_every=0)
    np.testing.assert_allclose(norm_rate(run).second_order, norm_rate(run).measured, atol=1e-12)
    with pytest.raises(MissingQuantityError, match="a flow time that all layers have in common"):
        network_norm_rate(run)
    frozen = smooth_network()
    frozen[0].requires_grad_(False)
    run = recorded(tmp_path / "frozen", frozen, torch.optim.SGD(frozen.parameters(), 0.1), vectors(3))
    assert network_norm_rate(run).measured.notnull().all()  # a layer that stays has no time of its own


def test_where_nothing_is_trained_the_norm_stands_still(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        for _ in range(3):
            optimizer.step()  # without a gradient
    assert network_norm_rate(open_run(tmp_path / "run")).measured.values.tolist() == [0, 0, 0]


@pytest.mark.parametrize("window", [1, 4, 5, 40])
def test_a_window_is_the_mean_of_half_its_values_at_least_and_of_finite_ones(window: int) -> None:
    values = np.random.default_rng(0).normal(size=(30, 2)) * 10.0 ** np.linspace(6, -6, 30)[:, None]
    values[[3, 4, 11], 0], values[20, 1] = np.nan, np.inf
    found = _rolled(xr.DataArray(values.T, dims=("layer", "step")), window).transpose("step", "layer")
    for step in range(30):
        around = values[max(0, step - window // 2) : step + (window + 1) // 2]
        finite = np.isfinite(around)
        known = (finite.sum(0) >= (window + 1) // 2) & ~np.isinf(around).any(0)
        sums = [math.fsum(column[of]) for column, of in zip(around.T, finite.T, strict=True)]
        expected = np.where(known, sums / np.maximum(finite.sum(0), 1), np.nan)
        np.testing.assert_allclose(found.isel(step=step), expected, rtol=1e-11)
