"""A step that a gradient scaler had a fused optimizer skip is no step to theory: as if its batch had not been there."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import Batch, recorded, smooth_network, vectors
from torch import Tensor, nn

import analysis

SKIPPED = (0, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.DataTree, xr.DataTree]:
    """A training with skipped steps, and the same on the other batches alone."""
    torch.set_default_dtype(torch.float64)
    path, batches = tmp_path_factory.mktemp("runs"), vectors(7)
    kept = [batch for number, batch in enumerate(batches) if number not in SKIPPED]
    return trained(path / "with", batches, SKIPPED), trained(path / "without", kept, ())


def trained(path: Path, batches: list[Batch], skipped: tuple[int, ...]) -> xr.DataTree:
    torch.manual_seed(0)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    numbers = iter(range(len(batches)))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        if next(numbers) in skipped:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        return loss

    return recorded(path, model, optimizer, batches, step, curvature_every=1)


@pytest.mark.parametrize("name", ["loss_decrease", "stability", "norm_rate", "norm_balance"])
def test_a_skipped_step_is_left_out(runs: tuple[xr.DataTree, xr.DataTree], name: str) -> None:
    with_it, without = (getattr(analysis, name)(run) for run in runs)
    assert with_it.step.values.tolist() == [1, 2, 4, 5, 6]
    for variable, expected in without.items():
        np.testing.assert_allclose(with_it[variable], expected, rtol=1e-9, atol=1e-13, err_msg=variable)


def test_a_window_reaches_over_a_skipped_step(runs: tuple[xr.DataTree, xr.DataTree]) -> None:
    rate = analysis.norm_rate(runs[0], window=3)
    assert np.isfinite(rate.first_order[1:-1]).all()
