"""Loops put together at random: nothing of the training changes, and each row is what autograd finds by hand."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import Batch, prefetched, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run

BLOCKS = [
    lambda: nn.Linear(5, 5), lambda: nn.Dropout(0.3), lambda: nn.BatchNorm1d(5), lambda: nn.LayerNorm(5), nn.Tanh,
    nn.GELU, nn.ReLU, lambda: nn.PReLU(5), lambda: nn.RMSNorm(5),
]  # fmt: skip
OPTIMIZERS = [
    lambda groups: torch.optim.SGD(groups, 0.05, weight_decay=0.01),
    lambda groups: torch.optim.SGD(groups, 0.03, momentum=0.9, nesterov=True),
    lambda groups: torch.optim.AdamW(groups, 0.01),
    lambda groups: torch.optim.RMSprop(groups, 0.003),
]
CLIPS = [
    lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1),
    lambda parameters: nn.utils.clip_grad_value_(parameters, 0.02),
    lambda parameters: None,
]


@dataclass
class Forward:
    """The network, the batch and the random numbers as a forward pass begins."""

    model: nn.Module
    batch: Batch
    numbers: Tensor

    def loss(self, theta: dict[str, Tensor]) -> Tensor:
        """The loss at other parameters, from there on."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.numbers)
            outputs = torch.func.functional_call(copy.deepcopy(self.model), theta, (self.batch[0],))
        return F.cross_entropy(outputs, self.batch[1])


class Training:
    """One that a seed makes: what it is made of, and what it does, is the same with a recorder and without."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        blocks = [draw.choice(BLOCKS)() for _ in range(draw.randint(1, 4))]
        self.model = nn.Sequential(nn.Linear(4, 5), *blocks, nn.Linear(5, 3))
        self.model[0].requires_grad_(draw.random() < 0.8)
        parameters = list(self.model.parameters())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.02}]
        self.optimizer = draw.choice(OPTIMIZERS)(groups if draw.random() < 0.3 else parameters)
        self.clip, self.parts, self.to_none = draw.choice(CLIPS), draw.choice([1, 1, 2, 3]), draw.random() < 0.5
        self.ahead, self.skipped = draw.random() < 0.3, draw.choice([None, 1, 3])
        self.evaluates, self.looks_first = draw.random() < 0.3, draw.random() < 0.2
        self.evaluates &= not self.ahead or self.parts < 3  # or the first step begins from a later forward pass
        self.by_hand, self.rows = ByHand(self.model), []

    def run(self, recorder: Recorder | None = None) -> None:
        """Train, and find by hand what each step was."""
        batches = vectors(7) if recorder is None else recorder.watch(vectors(7))
        passes: list[Forward] = []
        for number, batch in enumerate(prefetched(batches) if self.ahead else batches):
            if number == self.skipped and not self.ahead:
                continue
            if self.looks_first and not self.ahead:
                with torch.no_grad():
                    self.model(batch[0])
            passes.append(Forward(copy.deepcopy(self.model), batch, torch.get_rng_state()))
            (F.cross_entropy(self.model(batch[0]), batch[1]) / self.parts).backward()
            if len(passes) == self.parts:
                self.clip(self.model.parameters())
                self.by_hand.before()
                self.optimizer.step()
                self.by_hand.after()
                self.rows.append(self.curvature(passes))
                self.optimizer.zero_grad(set_to_none=self.to_none)
                passes = []
            if self.evaluates:
                with torch.no_grad():
                    self.model(batch[0])

    def end(self) -> list[Tensor]:
        """Weights, buffers, the optimizer's state, and what is drawn next."""
        state = self.optimizer.state_dict()["state"]
        kept = [one for of_parameter in state.values() for one in of_parameter.values() if one is not None]
        return [*self.model.state_dict().values(), *kept, torch.rand(3)]

    def curvature(self, passes: list[Forward]) -> dict[str, float]:
        """The quantities of the whole network, by second derivatives at θ before the step."""
        theta = {name: one.clone().requires_grad_() for name, one in self.by_hand.theta.items()}
        trained = [name for name, one in self.model.named_parameters() if one.requires_grad]
        after = {name: one.detach() for name, one in self.model.named_parameters()}
        update = [after[name] - theta[name].detach() for name in trained]
        loss = sum(one.loss(theta) for one in passes) / len(passes)
        grad = torch.autograd.grad(loss, [theta[name] for name in trained], create_graph=True)

        def product(vector: list[Tensor]) -> float:
            along = sum((one * other).sum() for one, other in zip(grad, vector, strict=True))
            turned = torch.autograd.grad(along, [theta[name] for name in trained], retain_graph=True)
            return sum((one * other).sum().item() for one, other in zip(turned, vector, strict=True))

        return {
            "loss_before": loss.item(),
            "loss_after": sum(one.loss(after).item() for one in passes) / len(passes),
            "grad_sqnorm": sum(one.square().sum().item() for one in grad),
            "grad_update": sum((one * other).sum().item() for one, other in zip(grad, update, strict=True)),
            "grad_hess_grad": product([one.detach() for one in grad]),
            "update_hess_update": product(update),
        }


@pytest.mark.parametrize("seed", range(24))
def test_a_loop_put_together_at_random(tmp_path: Path, seed: int) -> None:
    (bare := Training(seed)).run()
    expected = bare.end()
    training = Training(seed)
    with Recorder(tmp_path / "run", training.model, training.optimizer, curvature_every=1) as recorder:
        training.run(recorder)
    assert all(torch.equal(one, other) for one, other in zip(expected, training.end(), strict=True))
    run = open_run(tmp_path / "run")
    found = run["curvature"].to_dataset()
    for name in training.rows[0]:
        values = found[name].sum("layer") if "layer" in found[name].dims else found[name]
        np.testing.assert_allclose(values, [row[name] for row in training.rows], rtol=1e-6, atol=1e-10, err_msg=name)
    training.by_hand.agrees_with(run["steps"])
