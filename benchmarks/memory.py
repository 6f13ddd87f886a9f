"""What memory a recorder takes, in bytes a parameter, beside its floor: ``python benchmarks/memory.py``.

Each contender trains in a process of its own; the peaks of their memory, on a GPU of what PyTorch allocated there, are
compared with that of the bare training.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from machine import describe
from torch import nn
from torch.nn.functional import cross_entropy

from dynamics import Recorder, schema

WITHOUT_START = [row.name for row in schema.quantities("steps") if row.name != "distance_sqnorm"]
CONTENDERS = {
    "bare": None,
    "first order": {"curvature_every": 0},
    "first order without distance_sqnorm": {"curvature_every": 0, "quantities": WITHOUT_START},
    "first order and curvature": {"curvature_every": 1},
}
FLOORS = {  # vectors in float32 that must be there at once
    "first order": "16: θ, g, Δθ, θ₀",
    "first order without distance_sqnorm": "12: θ, g, Δθ",
    "first order and curvature": "24: these, the loss's own gradient, and the graph's derivative of it",
}


def train(settings: dict | None, width: int, depth: int, steps: int, device: torch.device) -> float:
    """Peak memory in bytes a parameter, of this process or on its GPU, after training a perceptron with SGD."""
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(8, width, device=device), torch.randint(10, (8,), device=device))] * steps
    with tempfile.TemporaryDirectory() as folder:
        recording = settings is not None
        with (
            Recorder(Path(folder) / "run.zarr", model, optimizer, **settings)
            if recording
            else nullcontext() as recorder
        ):
            for inputs, labels in recorder.watch(batches) if recording else batches:
                optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak / sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Measure each contender in a process of its own, and print what it takes more than the bare training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="width of the perceptron")
    parser.add_argument("--depth", type=int, default=6, help="its hidden layers")
    parser.add_argument("--steps", type=int, default=4, help="training steps")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--contender", choices=CONTENDERS, help="train this one here, and print its peak alone")
    asked = parser.parse_args()
    if asked.contender:
        device = torch.device(asked.device)
        print(train(CONTENDERS[asked.contender], asked.width, asked.depth, asked.steps, device))
        return
    print(describe(asked.device))
    sizes = [f"--{name}={getattr(asked, name)}" for name in ("width", "depth", "steps", "device")]
    peaks = {
        name: float(subprocess.check_output([sys.executable, __file__, *sizes, "--contender", name]).split()[-1])
        for name in CONTENDERS
    }
    print(f"bare: {peaks['bare']:.1f} bytes a parameter; more than that:")
    for name, floor in FLOORS.items():
        print(f"  {name:38} {peaks[name] - peaks['bare']:5.1f}   floor {floor}")


if __name__ == "__main__":
    main()
