"""Steps that lead to where the objective fails, and loops that go back before they go on, as by projecting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynamics import Recorder, open_run

DATA = torch.tensor([1e-3, 0.5], dtype=torch.float64)


class Variances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.tensor([0.01, 1.0], dtype=torch.float64))


def negative_log_likelihood(model: Variances, data: Tensor) -> Tensor:
    if (model.variance <= 0).any():
        raise ValueError("a variance is negative")
    return (data**2 / model.variance + model.variance.log()).sum()


def trained(path: Path, *, in_a_hook: bool) -> tuple[Variances, list[Tensor]]:
    model = Variances()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def project(*_: object) -> None:
        with torch.no_grad():
            model.variance.clamp_(min=1e-4)

    if in_a_hook:
        optimizer.register_step_post_hook(project)
    before = []
    with Recorder(path, model, optimizer, objective=negative_log_likelihood, curvature_every=1) as recorder:
        for _ in range(4):
            recorder.observe(DATA)
            before.append(model.variance.detach().clone())
            optimizer.zero_grad()
            loss = negative_log_likelihood(model, DATA)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            if not in_a_hook:
                project()
    return model, before


def second_derivative(variance: Tensor) -> Tensor:
    return 2 * DATA**2 / variance**3 - 1 / variance**2


@pytest.mark.parametrize("in_a_hook", [False, True])
def test_curvature_is_recorded_all_the_same(tmp_path: Path, recwarn: pytest.WarningsRecorder, in_a_hook: bool) -> None:
    """By hand the Hessian is diagonal; only the loss after such a step is unknown, unless going back is its part."""
    model, before = trained(tmp_path / "run", in_a_hook=in_a_hook)
    run = open_run(tmp_path / "run")
    thetas = torch.stack(before)
    grads = 1 / thetas - DATA**2 / thetas**2
    expected = (grads**2 * second_derivative(thetas)).sum(1)
    np.testing.assert_allclose(run["curvature"].grad_hess_grad.sum("layer"), expected, rtol=1e-10)
    after = torch.stack([*before[1:], model.variance.detach()])
    left = thetas - 0.01 * grads
    defined = (left > 0).all(1) | torch.tensor(in_a_hook)
    assert not (left > 0).all(1).all()
    losses = (DATA**2 / after + after.log()).sum(1).where(defined, torch.nan)
    np.testing.assert_allclose(run["curvature"].loss_after, losses, rtol=1e-12)
    said = [str(one.message) for one in recwarn]
    assert len(said) == (0 if in_a_hook else 1)
    assert all("first with ValueError: a variance is negative. If the loop moves them" in text for text in said)
