"""A GPU measures with channels first, of networks that train with channels last. Here a processor takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from experiments import assert_agree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynamics import Recorder, open_run
from dynamics.hardware import memory_order
from dynamics.models import build
from dynamics.pruning import Pruner

CONVOLUTIONS = {torch.ops.aten.convolution.default: 2, torch.ops.aten.convolution_backward.default: 3}
SAMPLES = 8
MEASURES = ("loss_preservation", "gradient_norm_increase")


class Operands(TorchDispatchMode):
    """Inside, whether torch chose a convolution's kernel for channels that come last, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: set[bool] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        of_the_batch = function in CONVOLUTIONS and len(args[0]) == SAMPLES  # others find out what belongs together
        operands = args[: CONVOLUTIONS[function]] if of_the_batch else ()
        self.channels_last |= {one.to(memory_format=torch.contiguous_format) is not one for one in operands}
        return function(*args, **(kwargs or {}))


def measured(path: Path, name: str) -> tuple[xr.DataTree, list[Tensor], set[bool]]:
    """Two steps with their curvature, scores and an event; the operands of all that the recorder computes itself."""
    torch.manual_seed(0)
    model = build(name, num_classes=10, width=1 / 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    inputs = torch.randn(SAMPLES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch, scores = (inputs, torch.randint(10, (SAMPLES,))), []
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        recorder.observe(batch)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), batch[1]).backward()
        with Operands() as operands:
            optimizer.step()  # of which the recorder measures the curvature
            pruners = [Pruner(model, optimizer, measure) for measure in MEASURES]
            prunings = [pruner.plan(0.3, [batch]) for pruner in pruners]
            with recorder.event("prune", probe=[batch], mode="train"):
                pruners[0].apply(prunings[0])
    scores = [score for pruning in prunings for score in pruning.scores.values()]
    return open_run(path), scores, operands.channels_last


@pytest.mark.parametrize(
    "name", ["vgg13", *(pytest.param(name, marks=pytest.mark.long) for name in ("mobilenet_v1", "resnet56"))]
)
def test_no_convolution_has_channels_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before, scores, operands = measured(tmp_path / "before", name)
    assert True in operands  # or the network could not tell
    monkeypatch.setattr(memory_order, "_WHERE", {"cpu"})
    found, others, operands = measured(tmp_path / "found", name)
    assert operands == {False}
    for one, other in zip(scores, others, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)
    assert_agree(found, before, ["curvature", "pruning"])


def test_what_else_there_is_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert memory_order.channels_first(last) is last  # on a processor
    monkeypatch.setattr(memory_order, "_WHERE", {"cpu"})
    first = memory_order.channels_first(last)
    assert torch.equal(first, last)
    assert first.stride() == (60, 20, 5, 1)
    depthwise = torch.randn(3, 1, 3, 3).as_strided((3, 1, 3, 3), (9, 1, 3, 1))
    assert memory_order.channels_first(depthwise).stride() == (9, 9, 3, 1)  # by its strides torch chooses the kernel
    for other in (last.half(), last.bfloat16(), torch.arange(6), torch.randn(4, 3).T, last.to_sparse()):
        assert memory_order.channels_first(other) is other
