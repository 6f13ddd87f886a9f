"""How a training's steps are computed is an option: in bfloat16, compiled; what is measured stays what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from experiments import few_digits, recorded
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from dynamics.data import Data
from dynamics.experiments import training
from dynamics.experiments.experiment import Experiment
from dynamics.models import build

TINY = Experiment(
    width=0.05, rounds=1, epochs=(2,), learning_rates=(0.1,), sparsity=0.5, batch_size=32, measure="grasp",
    importance_samples=20, probe_samples=16, curvature_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    return few_digits(50, 20)


def test_bfloat16_is_for_training_alone(tmp_path: Path, data: Data) -> None:
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone
    seen = set()

    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            seen.add((torch.is_autocast_enabled("cpu"), output.dtype, module.weight.dtype == torch.bfloat16))

    hook = register_module_forward_hook(look)
    try:
        low = recorded(tmp_path / "low.zarr", replace(TINY, precision="bfloat16"), data)
    finally:
        hook.remove()
    assert (True, torch.bfloat16, False) in seen
    assert not [one for one in seen if (one[1] == torch.bfloat16) != one[0] or one[2]]

    torch.manual_seed(TINY.seed)
    model = build(TINY.model, num_classes=10, in_channels=1, width=TINY.width)
    order = torch.Generator().manual_seed(TINY.seed)
    inputs, labels = next(iter(data.train.batches(32, shuffle=True, augment=True, generator=order)))
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = F.cross_entropy(model(inputs) / TINY.temperature, labels)
    assert float(low["steps"].loss[0]) == by_hand.item()
    exact = float(F.cross_entropy(model(inputs) / TINY.temperature, labels).detach())
    np.testing.assert_allclose(low["curvature"].loss_before[0], exact, rtol=1e-6)
    assert by_hand.item() != exact
    assert by_hand.item() == pytest.approx(exact, rel=0.01)


@pytest.mark.long
def test_a_compiled_experiment_is_the_eager_one(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned, and with a last batch that is smaller. Traced by torch.compile, but run as it is: not to take minutes."""
    asked = []

    def traced(model: nn.Module, device: torch.device) -> nn.Module:
        asked.append(device)
        return torch.compile(model, dynamic=False, backend="eager")

    monkeypatch.setattr(training, "compiled", traced)
    eager = recorded(tmp_path / "eager.zarr", TINY, data)
    assert not asked
    fast = recorded(tmp_path / "fast.zarr", replace(TINY, compile=True), data)
    assert asked == [torch.device("cpu")]
    assert fast["steps"].sizes["step"] == 4
    for node in ("steps", "curvature", "pruning", "units", "epochs"):
        xr.testing.assert_identical(
            *(record[node].to_dataset().drop_vars("seconds", errors="ignore") for record in (fast, eager))
        )
