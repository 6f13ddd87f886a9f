"""A gradient that is not finite is said once, with the first step and layer, and recorded as it is."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import smooth_network

from dynamics import Recorder, open_run


def written(path: Path) -> int:
    return open_run(path)["steps"].sizes.get("step", 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("when", ["in the end", "at a flush", "as it trains"])
def test_the_first_gradient_that_is_not_finite_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, when: str, value: float
) -> None:
    """Of 25 and 18 ones in two layers, one becomes ``value`` at step 5, and before that, at step 3, in the second."""
    model, expected = smooth_network(), np.tile([25.0, 18.0], (8, 1))
    expected[3, 1] = expected[5, 0] = value
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if when == "as it trains":
        monkeypatch.setattr("dynamics.record.buffer._ROWS", 1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for step in range(8):
            for layer, first in ((0, 5), (2, 3)):
                for parameter in model[layer].parameters():
                    parameter.grad = torch.ones_like(parameter)
                model[layer].bias.grad[1] = value if step == first else 1.0
            optimizer.step()
            if when == "at a flush":
                recorder.flush()
            while when == "as it trains" and step == 5 and written(tmp_path / "run") < 5:
                time.sleep(0.01)
        early = len(recwarn)
    assert early == (when != "in the end")
    (said,) = [str(one.message) for one in recwarn]
    assert said.startswith("‖g‖² of layer 2 is not finite at step 3: ")
    np.testing.assert_array_equal(open_run(tmp_path / "run")["steps"].grad_sqnorm, expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("quantities", [None, ["grad_sqnorm"]])
def test_steps_that_a_gradient_scaler_skips_are_none_of_them(
    tmp_path: Path, fused: bool, quantities: list[str] | None
) -> None:
    """It skips a step of the first of two optimizers alone, and halves the scale: that row has what was not applied."""
    torch.set_default_dtype(torch.float32)
    model, scaler = smooth_network(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizers = [torch.optim.SGD(model[layer].parameters(), 0.1, fused=fused) for layer in (0, 2)]
    theta = [parameter.detach().clone() for parameter in model.parameters()]
    with Recorder(tmp_path / "run", model, optimizers, curvature_every=0, quantities=quantities) as recorder:
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            if step == 1:
                model[0].bias.grad[1] = torch.inf
            scaler.scale(torch.zeros(()))
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            recorder.flush()
    taken = [(before - after).mean().item() for before, after in zip(theta, model.parameters(), strict=True)]
    np.testing.assert_allclose(taken, [0.075, 0.075, 0.1, 0.1], rtol=1e-5)
    assert np.isinf(open_run(tmp_path / "run")["steps"].grad_sqnorm).any() == fused


@pytest.mark.filterwarnings("error")
def test_what_is_not_logged_or_not_trained_is_no_gradient_that_is_not_finite(tmp_path: Path) -> None:
    model = smooth_network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for step in range(3):
            if step == 1:
                recorder.log(loss=torch.nan)
            model[2].weight.grad = torch.ones_like(model[2].weight)
            optimizer.step()
    assert open_run(tmp_path / "run")["steps"].loss.isnull().all()
