"""A compiled training is the eager one, but for rounding, pruned too; what cannot be compiled is said in a line."""

from pathlib import Path

import pytest
import torch
import xarray as xr
from experiments import assert_agree
from networks import convolutional_network, images
from torch import nn
from torch._inductor import config

from dynamics import Recorder, open_run
from dynamics.experiments.compiling import compiled
from dynamics.pruning import Pruner


def recorded(path: Path, *, compile: bool) -> xr.DataTree:
    """Two steps, and a pruning between them."""
    torch.manual_seed(0)
    model, batches = convolutional_network(), images(2)
    trained = compiled(model, torch.device("cpu")) if compile else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3, fused=True)
    with Recorder(path, trained, optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(trained(inputs), labels)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            if number == 0:
                with recorder.event("prune", probe=batches):
                    Pruner(model, optimizer, "loss_preservation").prune(0.5, batches)
    return open_run(path)


def test_a_compiled_training_is_recorded_as_the_eager_one(tmp_path: Path) -> None:
    eager, fast = (recorded(tmp_path / f"{compile}.zarr", compile=compile) for compile in (False, True))
    assert torch._dynamo.utils.counters["inductor"]  # it did run compiled
    assert_agree(fast, eager, ["steps", "curvature", "pruning"])


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot compile here: .*no-such-compiler.*; install .* or leave compile off"):
        compiled(nn.Linear(2, 2), torch.device("cpu"))
