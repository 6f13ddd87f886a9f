"""Where no batches are announced, what is logged for the micro-batches of a step is averaged in its row."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import smooth_network, vectors

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
