"""What is measured on a GPU is computed in float32, and a program's settings are left as they are."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import smooth_network, vectors
from torch import nn
from torch.backends import cudnn

from dynamics import Recorder, open_run
from dynamics.hardware.precision import full_precision
from dynamics.pruning import Pruner, apply_masks

# Each in a process of its own: some of PyTorch's settings cannot be undone.
SETTINGS = {
    "none": "",
    "TF32 for products of matrices": "torch.set_float32_matmul_precision('high')",
    "bfloat16 for products of matrices": "torch.set_float32_matmul_precision('medium')",
    "both of the older names": "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False",
    "older names": "torch.backends.cudnn.allow_tf32 = False; torch.backends.cuda.matmul.allow_tf32 = True",
    "newer names": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "newer name of products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "one name for all": "torch.backends.fp32_precision = 'tf32'",
}
CHECK = """
import os, traceback
import torch
from torch.backends import cuda, cudnn, mkldnn
from dynamics.hardware.precision import full_precision

def read(get):
    try:
        return get()
    except RuntimeError:  # the older names, after newer ones were used
        return "mixed"

def settings():
    older = [lambda: cudnn.allow_tf32, lambda: cuda.matmul.allow_tf32, torch.get_float32_matmul_precision]
    newer = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul, torch.backends]
    return [read(get) for get in older] + [one.fp32_precision for one in newer]

def check(setting):
    exec(setting)
    before = settings()
    try:
        with full_precision():
            inside = settings()
            1 / 0
    except ZeroDivisionError:
        pass
    assert settings() == before, (before, settings())
    assert "tf32" not in inside[3:6] and True not in inside[:2], inside
    assert [inside[6], inside[8]] == [before[6], before[8]], (before, inside)
    assert inside[7] in (before[7], "ieee"), (before, inside)  # for the older name sets both
    for older, one in zip(inside[:3], before[:3]):
        assert one == "mixed" or older != "mixed", (before, inside)

for name, setting in SETTINGS.items():
    if not os.fork():
        try:
            check(setting)
            print(name)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess[str]:
    """Prints the settings that are kept."""
    command = [sys.executable, "-uc", f"SETTINGS = {SETTINGS}\n{CHECK}"]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_full_precision_sets_and_restores_what_pytorch_reads(
    setting: str, checked: subprocess.CompletedProcess[str]
) -> None:
    assert setting in checked.stdout.splitlines(), checked.stderr


def test_it_ends_when_nobody_is_inside_any_more() -> None:
    """Two threads, one after the other in and out, and one within itself."""
    before, inside = cudnn.conv.fp32_precision, threading.Barrier(2)
    first_is_out, found = threading.Event(), []

    def second() -> None:
        with full_precision():
            inside.wait()
            first_is_out.wait()
            with full_precision():
                pass
            found.append(cudnn.conv.fp32_precision)

    cudnn.conv.fp32_precision = "tf32"
    try:
        thread = threading.Thread(target=second)
        with full_precision():
            thread.start()
            inside.wait()
        first_is_out.set()
        thread.join()
        assert found == ["ieee"]
        assert cudnn.conv.fp32_precision == "tf32"
    finally:
        cudnn.conv.fp32_precision = before


def test_a_step_within_autocast_is_measured_in_full_precision(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)

    def measured(path: Path, *, inside: bool) -> xr.Dataset:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        with Recorder(path, model, optimizer, curvature_every=1) as recorder:
            for inputs, labels in recorder.watch([(torch.randn(8, 16), torch.randint(3, (8,))) for _ in range(3)]):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    F.cross_entropy(model(inputs), labels).backward()
                    if inside:
                        optimizer.step()
                        assert torch.is_autocast_enabled("cpu")
                if not inside:
                    optimizer.step()
        return open_run(path)["curvature"].to_dataset()

    xr.testing.assert_equal(measured(tmp_path / "in", inside=True), measured(tmp_path / "out", inside=False))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_batches_of_a_network_of_few_digits_are_measured_as_one(tmp_path: Path, dtype: torch.dtype) -> None:
    def measured(count: int) -> xr.Dataset:
        model = smooth_network().to(dtype)
        model.load_state_dict(start)
        keep = {"0.weight": torch.arange(20).view(5, 4) % 5 > 0}
        with Recorder(tmp_path / f"{count}.zarr", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
            with recorder.event("prune", probe=[(inputs.to(dtype), labels)] * count):
                apply_masks(model, keep)
        return open_run(tmp_path / f"{count}.zarr")["pruning"].to_dataset().drop_vars("kind")

    start, ((inputs, labels),) = smooth_network().state_dict(), vectors(1)
    one, many = measured(1), measured(300)
    for name in ("loss", "grad_sqnorm", "param_hess_grad", "grad_sqnorm_second_order"):
        largest = float(np.abs(one[name]).max())
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=0.01 * largest, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_few_digits_is_no_wrong_derivative(tmp_path: Path, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    block = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    probe = [(torch.randn(32, 3, 8, 8).to(dtype), torch.arange(32) % 4)]
    with Recorder(tmp_path / "run.zarr", model.to(dtype), torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=probe):
            Pruner(model, None, "magnitude", granularity="weight").prune(0.3)
    assert open_run(tmp_path / "run.zarr").pruning.grad_sqnorm_second_order.notnull().all()
