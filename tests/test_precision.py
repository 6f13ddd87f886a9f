"""What is measured on a GPU is computed in float32, and a program's settings are left as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each in a process of its own: some of PyTorch's settings cannot be undone.
SETTINGS = {
    "none": "",
    "TF32 for products of matrices": "torch.set_float32_matmul_precision('high')",
    "older names": "torch.backends.cudnn.allow_tf32 = False; torch.backends.cuda.matmul.allow_tf32 = True",
    "newer names": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "newer name of products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "one name for all": "torch.backends.fp32_precision = 'tf32'",
}
CHECK = """
import torch
from torch.backends import cuda, cudnn, mkldnn
from dynamics.precision import full_precision

def read(get):
    try:
        return get()
    except RuntimeError:  # the older names, after newer ones were used
        return "mixed"

def settings():
    older = [lambda: cudnn.allow_tf32, lambda: cuda.matmul.allow_tf32, torch.get_float32_matmul_precision]
    newer = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul, torch.backends]
    return [read(get) for get in older] + [one.fp32_precision for one in newer]

{setting}
before = settings()
try:
    with full_precision():
        inside = settings()
        1 / 0
except ZeroDivisionError:
    pass
assert settings() == before, (before, settings())
assert "tf32" not in inside[3:6] and True not in inside[:2], inside
assert inside[6:] == before[6:], (before, inside)
for older, one in zip(inside[:2], before[:2]):
    assert one == "mixed" or older != "mixed", (before, inside)
"""


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_full_precision_sets_and_restores_what_pytorch_reads(setting: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHECK.format(setting=setting)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
