"""How exact is what is recorded of a training in single precision: ``python benchmarks/exactness.py``.

Each network trains for some steps; from there the same step is taken and recorded in float64, and in float32 with
images and weights contiguous and channels-last. Printed is the relative difference to float64.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from pathlib import Path

import torch
from machine import describe
from torch import nn
from torch.nn.functional import cross_entropy

from dynamics import Recorder, open_run
from dynamics.data import Batch, load
from dynamics.models import build

NETWORKS = {  # as in configs/laptop.yaml: width, data, batch size
    "vgg13": (0.125, "fashion-mnist", 64),
    "mobilenet_v1": (0.25, "fashion-mnist", 64),
    "resnet56": (0.25, "digits", 32),
}
FORMATS = {
    "float64": (torch.float64, torch.contiguous_format),
    "contiguous": (torch.float32, torch.contiguous_format),
    "channels-last": (torch.float32, torch.channels_last),
}
QUANTITIES = ("loss_before", "grad_sqnorm", "grad_hess_grad", "param_hess_grad")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step on the cross-entropy at temperature 5, the paper's."""
    inputs, labels = batch
    optimizer.zero_grad()
    cross_entropy(model(inputs) / 5, labels).backward()
    optimizer.step()


def recorded(model: nn.Module, batch: Batch, folder: Path) -> dict[str, float]:
    """What one step of SGD records of the whole network, and by how much the loss fell."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(folder, model, optimizer, curvature_every=1) as recorder:
        for watched in recorder.watch([batch]):
            step(model, optimizer, watched)
    row = open_run(folder)["curvature"].isel(step=0)
    measured = {name: row[name].sum().item() for name in QUANTITIES}
    return measured | {"decrease": (row.loss_before - row.loss_after).item()}


def main() -> None:
    """Train each network, record its next step in each format, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of training before (default: 30)")
    given = parser.parse_args()
    print(describe())
    for name, (width, data, batch_size) in NETWORKS.items():
        torch.manual_seed(0)
        trained = build(name, num_classes=10, in_channels=1, width=width)
        passes = itertools.repeat(load(data).train.batches(batch_size, augment=True))
        batches = list(itertools.islice(itertools.chain.from_iterable(passes), given.steps + 1))
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.02, momentum=0.9)
        for batch in batches[:-1]:
            step(trained, optimizer, batch)
        inputs, labels = batches[-1]
        found = {}
        for kind, (dtype, layout) in FORMATS.items():
            model = copy.deepcopy(trained).to(dtype).to(memory_format=layout)
            with tempfile.TemporaryDirectory() as folder:
                shown = inputs.to(dtype).contiguous(memory_format=layout)
                found[kind] = recorded(model, (shown, labels), Path(folder) / "run.zarr")
        exact = found.pop("float64")
        print(f"\n{name}, width {width:g}, {data}, {given.steps} steps:")
        for quantity, value in exact.items():
            errors = ", ".join(f"{kind} {abs(row[quantity] / value - 1):.1e}" for kind, row in found.items())
            print(f"  {quantity:16} {value:12.6g}   {errors}")


if __name__ == "__main__":
    main()
