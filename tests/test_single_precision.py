"""Most people train in float32: what is recorded then, beside the same two steps in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from networks import (
    Batch,
    attention_network,
    convolutional_network,
    images,
    plain_step,
    prune_row,
    smooth_network,
    vectors,
)
from torch import Tensor, nn

from dynamics import Recorder, open_run


class Recurrent(nn.Module):
    """A GRU over four numbers a time, and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.recurrent(inputs.unflatten(1, (4, 1)))[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Batch]]]] = {
    "tanh": (smooth_network, vectors),
    "BatchNorm": (convolutional_network, images),
    "attention": (attention_network, vectors),
    "GRU": (Recurrent, vectors),
}
OPTIMIZERS = {  # large steps: Δθ is known to the rounding of θ alone; with this eps, Adam takes no steps along noise
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.1, eps=1),
}


def record(path: Path, model: nn.Module, optimizer: Callable, batches: list[Batch]) -> xr.DataTree:
    """Two steps, their curvature, and a pruning of a row of the first weight."""
    dtype = next(model.parameters()).dtype
    batches = [(inputs.to(dtype), labels) for inputs, labels in batches]
    optimizer = optimizer(model.parameters())
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(batches[:2]):
            plain_step(model, optimizer, batch)
        with recorder.event("pruning", probe=batches[2:]):
            prune_row(model, next(name for name, _ in model.named_parameters()), 0)
    return open_run(path)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_record_in_float32_is_the_one_in_float64(tmp_path: Path, network: str, optimizer: str) -> None:
    build, data = NETWORKS[network]
    model, batches = build(), data(3)
    single = copy.deepcopy(model).float()
    model.load_state_dict(single.state_dict())  # the same values, to the last digit
    exact = record(tmp_path / "exact", model, OPTIMIZERS[optimizer], batches)
    found = record(tmp_path / "found", single, OPTIMIZERS[optimizer], batches)
    for group in ("steps", "curvature", "pruning"):
        assert set(found[group].data_vars) == set(exact[group].data_vars) != set()
        for name, values in exact[group].data_vars.items():
            if np.issubdtype(values.dtype, np.floating):
                least = 1e-5 * np.abs(values).max().item()
                np.testing.assert_allclose(
                    found[group][name], values, 0, np.nan_to_num(least), err_msg=f"{group}: {name}"
                )
