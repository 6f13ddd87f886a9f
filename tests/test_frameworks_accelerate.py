"""A recorder takes what Accelerate has prepared; what it records is what the loop itself sees."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, open_run

accelerate = pytest.importorskip("accelerate")

DATA = TensorDataset(*images(1, size=40)[0])


@pytest.fixture(autouse=True)
def _one_accelerator_a_test() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def squares(model: nn.Module) -> float:
    return sum(p.grad.double().square().sum().item() for p in model.parameters())


def trained(path: Path | None, clip: float = 0.0, steps: int = 1, **settings: Any) -> tuple[nn.Module, list[float]]:
    """The model after two epochs of five batches, and ‖g‖² at each step; recorded where a path is given."""
    torch.manual_seed(3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps, **settings)
    model = convolutional_network(dropout=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    loader = DataLoader(TensorDataset(DATA.tensors[0].float(), DATA.tensors[1]), 8, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    applied = []
    recorder = Recorder(path, model, optimizer, curvature_every=1) if path else None
    with recorder or nullcontext():
        watched = recorder.watch(loader) if recorder else loader
        for _ in range(2):
            for inputs, labels in watched:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(inputs), labels))
                    if accelerator.sync_gradients:
                        if clip:
                            accelerator.clip_grad_norm_(model.parameters(), clip)
                        applied.append(squares(model))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    assert not optimizer.optimizer._optimizer_step_pre_hooks
    return accelerator.unwrap_model(model), applied


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.05},
    "accumulated": {"steps": 2},  # and of the fifth batch alone
    "mixed": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_is_recorded_and_stays_the_same(tmp_path: Path, case: str) -> None:
    without, _ = trained(None, **CASES[case])
    random_without = torch.get_rng_state()
    model, applied = trained(tmp_path / "run", **CASES[case])
    assert torch.equal(random_without, torch.get_rng_state())
    for one, other in zip(without.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    run = open_run(tmp_path / "run")
    assert len(applied) == (6 if case == "accumulated" else 10)
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-5)
    np.testing.assert_array_equal(run["steps"].epoch, np.repeat([0, 1], len(applied) // 2))
    assert run["curvature"].sizes["step"] == len(applied)


def test_curvature_is_measured_in_full_precision_whatever_the_forward_pass_rounds_to(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    plain, losses = convolutional_network(), []
    model = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch([(DATA.tensors[0].float(), DATA.tensors[1])] * 3):
            plain.load_state_dict(model.state_dict())
            losses.append(F.cross_entropy(plain(inputs), labels).item())
            accelerator.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-6)
