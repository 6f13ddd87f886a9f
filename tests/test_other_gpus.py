"""GPUs that are not NVIDIA's: without float64, and with random numbers and autocasting of their own."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dynamics
from dynamics import float64
from dynamics.hardware.random_numbers import RandomState, random_numbers_untouched

APPLE = torch.device("mps")
HOST = {  # where float64 is asked for all the same: of tensors in host memory, or on it
    "recording/event.py": ".double() for layer in self.alive]",
    "experiments/protocols.py": "score[None].double().numpy()",
    "curvature/gated_affine.py": "sum(dtype=torch.float64)",  # on a CPU
    "pruning/shrinking/cut.py": "torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)",
}


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """The generator of a GPU of Apple's, as torch.mps gives access to its state."""
    own = torch.Generator()
    module = SimpleNamespace(get_rng_state=lambda device: own.get_state(), set_rng_state=lambda s, d: own.set_state(s))
    monkeypatch.setattr(torch, "get_device_module", {APPLE: module}.__getitem__)
    return own


def test_what_any_gpu_draws_is_drawn_again(generator: torch.Generator) -> None:
    with random_numbers_untouched(APPLE):
        drawn = torch.rand(3, generator=generator)
    assert torch.equal(torch.rand(3, generator=generator), drawn)


def test_states_of_any_gpu_are_told_apart(generator: torch.Generator) -> None:
    before = RandomState(APPLE)
    assert before == RandomState(APPLE)
    torch.rand(1, generator=generator)
    assert before != RandomState(APPLE)


def test_sums_are_in_float32_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float64.widest(torch.device("cpu")) == torch.float64
    assert float64.widened(torch.ones(2)).dtype == torch.float64

    def refuses(*size: int, dtype: torch.dtype, device: torch.device) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch, "ones", refuses)
    assert float64.widest(APPLE) == torch.float32


def test_no_gpu_is_asked_for_float64_that_it_may_not_have() -> None:
    """The words are searched, because no such GPU is here: ``.cpu()`` comes first, or the device is the host's."""
    package = Path(dynamics.__file__).parent
    asked = re.compile(r"(?<!\.cpu\(\))\.double\(\)|dtype=torch\.float64(?!, device=\"cpu\")")
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if name != "float64.py" and asked.search(line):
                assert HOST.get(name, "\0") in line, f"{name}:{number} {line.strip()}"
