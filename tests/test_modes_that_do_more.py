"""Modules whose train() does more than to set a flag are measured in either mode, and stay as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import images, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run
from dynamics.pruning.cost import network_cost


class Adapted(nn.Linear):
    """A frozen layer with an adapter of low rank, which it merges into its weights in eval mode, as LoRA's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.lora_B @ self.lora_A) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs if self.merged else outputs + inputs @ self.lora_A.T @ self.lora_B.T


class Normalised(nn.Sequential):
    """A network whose BatchNorm stays in eval mode while it trains, as it is fine-tuned."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_weight_that_an_adapter_is_merged_into(tmp_path: Path, mode: str, trains: bool) -> None:
    model, batches = nn.Sequential(Adapted(4, 6), nn.Tanh(), nn.Linear(6, 3)).train(trains), vectors(2)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    before, merged = copy.deepcopy(model.state_dict()), model[0].merged
    with Recorder(tmp_path / "run", model, optimizer) as recorder, recorder.event("look", probe=batches, mode=mode):
        pass
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert (model[0].merged, model[0].training) == (merged, trains)
    model.train(mode == "train")
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    loss = F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, create_graph=True)
    found = [(name, grad) for name, grad in zip(trained, grads, strict=True) if grad is not None]
    product = torch.autograd.grad(
        [grad for _, grad in found], [trained[name] for name, _ in found], [grad.detach() for _, grad in found]
    )
    event = open_run(tmp_path / "run")["pruning"].isel(event=0)
    for stage in ("before", "after"):
        row = event.sel(stage=stage)
        np.testing.assert_allclose(row.loss, loss.item(), rtol=1e-12)
        np.testing.assert_allclose(
            row.grad_sqnorm.sum("layer"), sum(grad.square().sum().item() for _, grad in found), rtol=1e-10
        )
        curved = sum((grad * one).sum().item() for (_, grad), one in zip(found, product, strict=True))
        np.testing.assert_allclose(row.grad_hess_grad.sum("layer"), curved, rtol=1e-10)


@pytest.mark.parametrize("trains", [True, False])
def test_what_looks_at_a_network_in_eval_mode_leaves_it_as_it_was(trains: bool) -> None:
    model = nn.Sequential(Adapted(4, 6), nn.Tanh(), nn.Linear(6, 3)).train(trains)
    before, merged = copy.deepcopy(model.state_dict()), model[0].merged
    network_cost(model, (4,), {})
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert (model[0].merged, model[0].training, model[1].training) == (merged, trains, trains)


def test_a_network_of_adapters_alone_has_no_gradient_in_eval_mode(tmp_path: Path) -> None:
    model = nn.Sequential(Adapted(4, 3))
    optimizer = torch.optim.SGD([model[0].lora_A, model[0].lora_B], 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with pytest.raises(ValueError, match="'eval' with ValueError: the loss depends on no trainable parameter"):
            with recorder.event("look", probe=vectors(1)):
                pass
    assert not model[0].merged


def test_what_a_network_keeps_in_eval_mode_stays_so_in_a_probe_in_training_mode(tmp_path: Path) -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    model, (batch,) = Normalised(*layers).train(), images(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("look", probe=[batch], mode="train"):
            pass
    loss = open_run(tmp_path / "run")["pruning"].loss
    np.testing.assert_allclose(loss[0], F.cross_entropy(model(batch[0]), batch[1]).item(), rtol=1e-12)
