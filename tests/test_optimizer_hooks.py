"""What others hang on an optimizer, and what goes wrong in its step: the record is of what was applied."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import plain_step, smooth_network, vectors
from torch import Tensor, nn

from dynamics import Recorder, open_run


@pytest.mark.parametrize("watched", [True, False])
def test_a_hook_that_clips_after_the_recorders_own(tmp_path: Path, watched: bool) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer, by_hand = torch.optim.SGD(model.parameters(), 0.1), ByHand(model)
    applied = []

    def clip(*arguments: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        applied.append(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        by_hand.before()

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=int(watched)) as recorder:
        first, *others = batches
        plain = ByHand(model)
        optimizer.zero_grad()
        F.cross_entropy(model(first[0]), first[1]).backward()
        plain.before()
        optimizer.step()
        plain.after()
        optimizer.register_step_pre_hook(clip)
        if not watched:
            recorder.flush()  # there is no batch that would say that a step is over
        for batch in recorder.watch(others) if watched else others:
            plain_step(model, optimizer, batch)
            by_hand.after()
    steps = open_run(tmp_path / "run")["steps"]
    by_hand.start, by_hand.rows = plain.start, plain.rows + by_hand.rows
    np.testing.assert_allclose(steps.grad_sqnorm[1:].sum("layer"), applied, rtol=1e-12)
    for name in ("grad_sqnorm", "param_grad", "grad_update", "update_sqnorm"):
        expected = [[row[layer][name] for layer in ("0", "2")] for row in by_hand.rows]
        np.testing.assert_allclose(steps[name], expected, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("ends", ["with another step", "with the loop"])
def test_a_closure_that_raises_costs_no_other_optimizers_step(tmp_path: Path, ends: str) -> None:
    model, batches = smooth_network(), vectors(3)
    first, second = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)
    by_hand = ByHand(model)

    def failing() -> Tensor:
        raise RuntimeError("out of memory")

    with Recorder(tmp_path / "run", model, [first, second], curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            model.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            by_hand.before(None if number < 1 else list(model[0].parameters()))
            first.step()
            if number < 1:
                second.step()
                by_hand.after()
                continue
            by_hand.after()
            with pytest.raises(RuntimeError, match="out of memory"):
                second.step(failing)
            if ends == "with the loop":
                break
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.sizes["step"] == (2 if ends == "with the loop" else 3)
    by_hand.agrees_with(steps)


def test_a_flush_after_a_step_that_failed(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    first, second = torch.optim.SGD(model[0].parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)

    def failing() -> Tensor:
        raise RuntimeError("out of memory")

    with Recorder(tmp_path / "run", model, [first, second], curvature_every=0) as recorder:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        first.step()
        with pytest.raises(RuntimeError, match="out of memory"):
            second.step(failing)
        recorder.observe(batch)
        recorder.flush()
        assert open_run(tmp_path / "run")["steps"].sizes["step"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_ascent_is_no_other_loss(tmp_path: Path, sign: int) -> None:
    model, losses = smooth_network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, maximize=True)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            (sign * loss).backward()
            optimizer.step()
            losses.append(loss.item())
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(curvature.loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_applied_grad, sign * curvature.grad_sqnorm, rtol=1e-10)
