"""What a pruning does is predicted the better, the less it removes; a real one is accounted for to the parameter."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, dense, flat, images, smooth_network, vectors

from analysis import pruning_effect
from dynamics import Recorder, open_run
from dynamics.masks import apply_masks

SHRINKAGES = (0.08, 0.04, 0.02, 0.01)


@pytest.mark.parametrize(
    ("quantity", "order", "expected"),
    [
        ("loss", "first_order", 2),
        ("loss", "second_order", 3),
        ("grad_sqnorm", "first_order", 2),
        ("param_sqnorm_rate", "first_order", 2),
    ],
)
def test_effect_of_a_vanishing_pruning(tmp_path: Path, quantity: str, order: str, expected: int) -> None:
    errors = []
    for shrinkage in SHRINKAGES:
        torch.manual_seed(0)
        model, batches = smooth_network(), vectors(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        path = tmp_path / str(shrinkage)
        with Recorder(path, model, optimizer) as recorder:
            with recorder.event("shrink", probe=batches), torch.no_grad():
                model[0].weight[1] *= 1 - shrinkage
        effect = pruning_effect(open_run(path)).sel(quantity=quantity).isel(event=0)
        errors.append(abs(float(effect.measured - effect[order])))
    slope = np.polyfit(np.log(SHRINKAGES), np.log(errors), 1)[0]
    assert slope == pytest.approx(expected, abs=0.12)


def test_gradient_norm_change_matches_grasp(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    filter_entries = slice(4, 8)  # the second row of the first weight
    grasp = (theta * (hessian @ grad))[filter_entries].sum()
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("shrink", probe=[batch]), torch.no_grad():
            model[0].weight[1] *= 1 - 1e-6
    effect = pruning_effect(open_run(tmp_path / "run")).sel(quantity="grad_sqnorm").isel(event=0)
    np.testing.assert_allclose(effect.first_order, -2e-6 * grasp, rtol=1e-9)
    np.testing.assert_allclose(effect.measured, -2e-6 * grasp, rtol=1e-4)


def test_a_masked_pruning_is_accounted_for(tmp_path: Path) -> None:
    model, batches = convolutional_network(), images(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    keep = torch.tensor([True, False, True, True])

    def loss_and_grad() -> tuple[float, torch.Tensor]:
        model.eval()
        loss = torch.stack([F.cross_entropy(model(inputs), labels) for inputs, labels in batches]).mean()
        grad = flat(torch.autograd.grad(loss, list(model.parameters())))
        model.train()
        return loss.item(), grad

    loss_before, grad_before = loss_and_grad()
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("prune", probe=batches, measure="by hand", target=0.25):
            masks = {"0.weight": keep.view(-1, 1, 1, 1).expand(4, 1, 3, 3)}
            apply_masks(model, masks | dict.fromkeys(("0.bias", "1.weight", "1.bias"), keep), optimizer)
    loss_after, grad_after = loss_and_grad()
    events = open_run(tmp_path / "run")["pruning"].to_dataset().isel(event=0)
    np.testing.assert_allclose(events.loss, [loss_before, loss_after], rtol=1e-12)
    kept = torch.cat([torch.ones_like(p).reshape(-1) for p in model.parameters()]).bool()
    kept[9:18], kept[37], kept[41], kept[45] = False, False, False, False
    np.testing.assert_allclose(
        events.grad_sqnorm.sum("layer"), [grad_before.square().sum(), grad_after[kept].square().sum()], rtol=1e-10
    )
    assert events.removed.values.tolist() == [10, 2, 0]
    assert events.remaining.sum("layer").values.tolist() == [len(kept), len(kept) - 12]
    np.testing.assert_allclose(events.removed_grad_sqnorm.sum(), grad_before[~kept].square().sum(), rtol=1e-10)
    assert str(events.measure.values) == "by hand"
    assert str(events["mode"].values) == "eval"


def test_an_event_that_fails_leaves_no_row(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with pytest.raises(RuntimeError, match="out of luck"), recorder.event("prune", probe=batches):
            raise RuntimeError("out of luck")
        with pytest.raises(ValueError, match="needs a list of batches"), recorder.event("prune", probe=batches[0][0]):
            pass
        with pytest.raises(ValueError, match="'train' or 'eval'"), recorder.event("p", probe=batches, mode="test"):
            pass
        for wrong, message in (
            ({"step": 3}, r"cannot take \['step'\]: the recorder measures them itself"),
            ({"removed": 3}, r"cannot take \['removed'\]"),
            ({"source": "x" * 65}, "texts of up to 64 characters, 'source' has 65"),
            ({"rates": [0.1, 0.2]}, r"takes numbers and texts, 'rates' is \[0.1, 0.2\]"),
        ):
            with pytest.raises(ValueError, match=message), recorder.event("prune", probe=batches, **wrong):
                pass
    assert "event" not in open_run(tmp_path / "run")["pruning"].sizes


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_pruning_is_predicted_from_the_network_before_it(tmp_path: Path, count: int) -> None:
    model, batches = smooth_network(), vectors(count)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        for number in range(2):
            theta = flat(list(model.parameters())).clone()
            pieces = [dense(model, batch)[1:] for batch in batches]
            with recorder.event("prune", probe=batches):
                keep = torch.ones(5, 4, dtype=torch.bool)
                keep[number] = False
                apply_masks(model, {"0.weight": keep}, optimizer)
    grad, hessian = (torch.stack(parts).mean(0) for parts in zip(*pieces, strict=True))
    grad[:4] = 0  # pruned before: a constant zero, without gradient
    removal = flat(list(model.parameters())) - theta
    assert int((removal != 0).sum()) == 4
    total = open_run(tmp_path / "run")["pruning"].to_dataset().isel(event=1).drop_vars(["kind", "mode"]).sum("layer")
    np.testing.assert_allclose(total.grad_removal, grad @ removal, rtol=1e-10)
    np.testing.assert_allclose(total.removal_hess_removal, removal @ hessian @ removal, rtol=1e-10)
    hess_grad = hessian @ grad
    np.testing.assert_allclose(total.grad_hess_removal, removal @ hess_grad, rtol=1e-10)
    part = slice(4, 8)
    expected = hess_grad @ removal - grad[part] @ (hessian @ removal)[part]
    np.testing.assert_allclose(total.kept_grad_hess_removal, expected, rtol=1e-10)
    kept = torch.ones(len(theta), dtype=torch.bool)
    kept[part] = False
    changed = theta[kept] @ (grad + hessian @ removal)[kept] - theta @ grad
    np.testing.assert_allclose(total.param_grad_change, changed, rtol=1e-10)
