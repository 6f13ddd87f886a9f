"""Weights and images lie channels-last in memory, all through a network; what is recorded does not depend on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr
from experiments import assert_agree
from networks import plain_step
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.data import load
from dynamics.models import MODELS, ResNet, build
from dynamics.pruning import Pruner


@pytest.mark.parametrize("name", MODELS)
def test_everything_lies_channels_last(name: str) -> None:
    model, seen = build(name, num_classes=10, in_channels=1, width=0.1), []

    def look(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(look)
    images, _ = next(iter(load("digits").train.batches(4, augment=True)))
    model(images.to(torch.get_default_dtype()))
    assert all(seen)


def test_images_lie_channels_last() -> None:
    colour = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    digits = load("digits").train
    for augment in (False, True):
        shown = type(digits)(colour, torch.arange(6), flip=True).batches(4, augment=augment)
        assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in shown)


NARROW = """
import copy, torch
from dynamics.models.resnet import BasicBlock
torch.manual_seed(0)
for threads in (2, 1):
    torch.set_num_threads(threads)
    for width in (1, 2, 3, 4, 7, 8):
        block = BasicBlock(width, width, stride=2).eval().to(memory_format=torch.channels_last)
        precise = copy.deepcopy(block).double()
        inputs = torch.randn(16, width, 16, 16).contiguous(memory_format=torch.channels_last)
        block(inputs).square().sum().backward()
        precise(inputs.double()).square().sum().backward()
        for (name, parameter), exact in zip(block.named_parameters(), precise.parameters(), strict=True):
            error = (parameter.grad - exact.grad).norm() / exact.grad.norm()
            assert error < 1e-4, f"{name}, width {width}, {threads} threads: {error:.2g}"
"""


@pytest.mark.long
def test_gradients_of_narrow_residual_blocks_are_right_without_avx512() -> None:
    """In a process of its own, which oneDNN could crash, and which is told not to use AVX-512."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", NARROW], env=environment, check=True, timeout=120)


def recorded(path: Path, memory_format: torch.memory_format) -> xr.DataTree:
    """Two steps, a pruning of half of the filters, and a step."""
    torch.manual_seed(0)
    model = ResNet(8, (3, 4, 5), num_classes=3, in_channels=2).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    inputs = torch.randn(3, 6, 2, 12, 12).unbind()
    batches = [(x.to(memory_format=memory_format), torch.arange(6) % 3) for x in inputs]
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            recorder.log(loss=plain_step(model, optimizer, batch))
            if number == 1:
                pruner = Pruner(model, optimizer, "grasp")
                pruning = pruner.plan(0.5, batches)
                with recorder.event("prune", probe=batches, **pruning.attributes) as event:
                    pruner.apply(pruning)
                    event.units(alive=pruning.alive, scores=pruning.scores)
    return open_run(path)


@pytest.mark.long
def test_the_record_is_the_same_in_either_format(tmp_path: Path) -> None:
    """Of a pruning too: all that is recorded, but for rounding."""
    formats = {"last": torch.channels_last, "first": torch.contiguous_format}
    last, first = (recorded(tmp_path / name, memory_format) for name, memory_format in formats.items())
    assert_agree(last, first, ["steps", "curvature", "pruning", "units"])


@pytest.mark.parametrize("name", MODELS)
def test_the_probe_of_a_pruned_network_computes_what_the_step_computed(tmp_path: Path, name: str) -> None:
    """To the last bit: where few filters are left, normalisations make much of a rounding."""
    model = build(name, num_classes=10, in_channels=1, width=0.1).float()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    batches = [(inputs.float(), labels) for inputs, labels in list(load("digits").train.batches(16))[:4]]
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            if number == 1:
                Pruner(model, optimizer, "magnitude").prune(0.5, batches)
    run = open_run(tmp_path / "run")
    assert run["curvature"].loss_before.values.tolist() == run["steps"].loss.values.tolist()
    assert run["curvature"].grad_sqnorm.values.tolist() == run["curvature"].applied_grad_sqnorm.values.tolist()
