"""Of which step is what a loop logs: of that whose backward passes it came with, announced or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run

WHENS = ("before the backward pass", "after the backward pass", "after the step", "once, before", "once, after")


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("when", WHENS)
def test_each_row_has_the_mean_of_its_own(tmp_path: Path, when: str, micro_batches: int) -> None:
    model, optimizer_of = smooth_network(), torch.optim.SGD
    optimizer = optimizer_of(model.parameters(), 0.1)
    expected, of_step = [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(vectors(4 * micro_batches)):
            loss = F.cross_entropy(model(inputs), labels)
            if when == "before the backward pass" or (when == "once, before" and number % micro_batches == 0):
                recorder.log(loss=loss)
            (loss / micro_batches).backward()
            of_step.append(loss.item())
            if when == "after the backward pass":
                recorder.log(loss=loss)
            stepped = (number + 1) % micro_batches == 0
            if stepped:
                optimizer.step()
                optimizer.zero_grad()
            if when == "after the step" or (when == "once, after" and stepped):
                recorder.log(loss=loss)
            if stepped:
                logged = {"once, before": of_step[:1], "once, after": of_step[-1:]}.get(when, of_step)
                expected.append(np.mean(logged))
                of_step = []
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


@pytest.mark.parametrize("announce", ["watch", "observe", "nothing"])
@pytest.mark.parametrize("ends", ["by itself", "with flushes"])
def test_a_backward_pass_for_another_network_comes_before_the_log(tmp_path: Path, announce: str, ends: str) -> None:
    critic, generator = smooth_network(), nn.Linear(2, 4)
    optimizers, expected = [torch.optim.SGD(one.parameters(), 0.1) for one in (critic, generator)], []
    with Recorder(tmp_path / "run", critic, optimizers[0], curvature_every=0) as recorder:
        batches = vectors(4)
        for real in recorder.watch(batches) if announce == "watch" else batches:
            if announce == "observe":
                recorder.observe(real)
            critic.zero_grad()
            loss = F.cross_entropy(critic(real[0]), real[1])
            loss.backward()
            optimizers[0].step()
            generator.zero_grad()
            critic(generator(real[0][:, :2])).mean().backward()  # adds to the critic's gradients as well
            optimizers[1].step()
            recorder.log(loss=loss)
            if ends == "with flushes":
                recorder.flush()
            expected.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)


def test_a_log_now_and_then_between_backward_pass_and_step(tmp_path: Path) -> None:
    model, expected = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(vectors(7)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            if number % 3 == 2:
                recorder.log(loss=loss)
            optimizer.step()
            expected.append(loss.item() if number % 3 == 2 else np.nan)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, expected, rtol=1e-12)
