"""L(θ) → b L(θ/a): a quantity of unit θᵖLᵠ scales by aᵖbᵠ, and time is θ²/L. The schema's units are held to it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import smooth_network, vectors
from torch import Tensor, nn

from dynamics import QUANTITIES, Recorder, open_run
from dynamics.network.masks import apply_masks

A, B = 3.0, 5.0
ROWS = [
    (row.name, node)
    for row in QUANTITIES.values()
    for node in row.nodes
    if node in ("steps", "curvature", "pruning")
    if row.name not in ("removed", "remaining") and (row.over or node != "pruning")
]


def scaled_loss(model: nn.Module, batch: tuple[Tensor, Tensor], a: float, b: float) -> Tensor:
    theta = {name: parameter / a for name, parameter in model.named_parameters()}
    return b * F.cross_entropy(torch.func.functional_call(model, theta, (batch[0],)), batch[1])


@cache
def record(a: float, b: float) -> dict[str, xr.Dataset]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, batches = smooth_network(), vectors(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(a)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * a**2 / b, momentum=0.5, weight_decay=0.02 * b / a**2)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return scaled_loss(model, batch, a, b)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        with Recorder(path, model, optimizer, objective=objective, curvature_every=1) as recorder:
            for batch in recorder.watch(batches):
                optimizer.zero_grad()
                loss = objective(model, batch)
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)
            with recorder.event("prune", probe=batches):
                apply_masks(model, {"0.weight": (torch.arange(5) > 0).view(5, 1).expand(5, 4)}, optimizer)
        return {node: open_run(path)[node].to_dataset().load() for node in ("steps", "curvature", "pruning")}


@pytest.mark.parametrize(("name", "node"), ROWS)
def test_quantities_scale_with_their_units(name: str, node: str) -> None:
    power_theta, power_loss = QUANTITIES[name].unit
    before, after = record(1.0, 1.0)[node][name], record(A, B)[node][name]
    np.testing.assert_allclose(after, before * A**power_theta * B**power_loss, rtol=1e-8, atol=1e-15)
    assert name in ("epoch", "skipped", "approximate") or float(np.abs(before).max()) > 0
