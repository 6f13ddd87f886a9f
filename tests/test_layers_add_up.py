"""Every quantity adds up over the layers to that of the flattened network, computed densely."""

from pathlib import Path

import numpy as np
import torch
from networks import dense, flat, flat_loss, plain_step, smooth_network, vectors

from dynamics import Recorder, open_run
from dynamics.network.masks import apply_masks
from dynamics.quantities import FORMULAS

SAY_IT = "write what each quantity is of the whole network, from the dense vectors"


def test_layers_add_up(tmp_path: Path) -> None:
    model, (first, second) = smooth_network(), vectors(2)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    start = flat(list(model.parameters())).clone()
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch([first, second]):
            theta, grad, hessian = dense(model, batch)
            plain_step(model, optimizer, batch)
            update = flat(list(model.parameters())) - theta
    run = open_run(tmp_path / "run")
    oracle = {
        "param_sqnorm": theta @ theta,
        "param_sqnorm_rate": -2 * theta @ grad,
        "grad_sqnorm": grad @ grad,
        "param_grad": theta @ grad,
        "abs_param_grad": (theta * grad).abs().sum(),
        "distance_sqnorm": (theta - start) @ (theta - start),
        "decay_sqnorm": 0.1 * theta @ theta,
        "update_sqnorm": update @ update,
        "param_update": theta @ update,
        "grad_update": grad @ update,
        "applied_grad_sqnorm": grad @ grad,
        "grad_applied_grad": grad @ grad,
        "grad_hess_grad": grad @ hessian @ grad,
        "param_hess_grad": theta @ hessian @ grad,
        "update_hess_update": update @ hessian @ update,
    }
    asked = {name for name in FORMULAS for node in ("steps", "curvature") if name in run[node]}
    assert asked == set(oracle), SAY_IT
    for node in ("steps", "curvature"):
        dataset = run[node].to_dataset().isel(step=1)
        for name in (name for name in FORMULAS if name in dataset):
            np.testing.assert_allclose(dataset[name].sum("layer"), oracle[name], rtol=1e-9, err_msg=name)


def test_layers_of_an_event_add_up(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    third = torch.func.jacfwd(torch.func.hessian(flat_loss(model, batch)))(theta)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        with recorder.event("prune", probe=[batch]):
            apply_masks(model, {"0.weight": (torch.arange(5) != 1).view(5, 1).expand(5, 4)})
    kept = torch.ones(43)
    kept[4:8] = 0
    removed, removal = 1 - kept, -theta * (1 - kept)
    new_theta, new_grad, new_hessian = dense(model, batch)
    new_grad *= kept  # what is pruned is a constant
    hess_removal = hessian @ removal
    curved = (third @ removal) @ removal
    hess_grad = hessian @ grad
    new_hess_grad = hess_grad + hessian @ (kept * hess_removal - removed * grad) + (third @ removal) @ (kept * grad)
    oracle = {
        "param_sqnorm": [theta @ theta, new_theta @ new_theta],
        "param_sqnorm_rate": [-2 * theta @ grad, -2 * new_theta @ new_grad],
        "grad_sqnorm": [grad @ grad, new_grad @ new_grad],
        "param_grad": [theta @ grad, new_theta @ new_grad],
        "abs_param_grad": [(theta * grad).abs().sum(), (new_theta * new_grad).abs().sum()],
        "grad_hess_grad": [grad @ hess_grad, new_grad @ new_hessian @ new_grad],
        "param_hess_grad": [theta @ hess_grad, new_theta @ new_hessian @ new_grad],
        "remaining": [43, 39],
        "grad_removal": grad @ removal,
        "removal_hess_removal": removal @ hess_removal,
        "grad_hess_removal": grad @ hess_removal,
        "kept_grad_hess_removal": (kept * grad) @ hess_removal,
        "grad_sqnorm_second_order": kept @ (hess_removal.square() + grad * curved),
        "param_grad_first_order": (kept * theta) @ (grad + hess_removal) - theta @ grad,
        "param_grad_second_order": (kept * theta) @ curved / 2,
        "param_hess_grad_first_order": (kept * theta) @ new_hess_grad - theta @ hess_grad,
        "removed_grad_sqnorm": removed @ grad.square(),
        "removed": 4,
    }
    events = open_run(tmp_path / "run")["pruning"].to_dataset().isel(event=0)
    assert {name for name in FORMULAS if name in events} == set(oracle), SAY_IT
    for name, expected in oracle.items():
        np.testing.assert_allclose(events[name].sum("layer"), expected, rtol=1e-9, err_msg=name)


def test_blocks_are_of_the_full_product(tmp_path: Path) -> None:
    model, (batch,) = smooth_network(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for watched in recorder.watch([batch]):
            plain_step(model, optimizer, watched)
    curvature = open_run(tmp_path / "run")["curvature"].to_dataset().isel(step=0)
    assert curvature.layer.values.tolist() == ["0", "2"]
    sizes = [25, 18]
    for name, vector in (("grad_hess_grad", grad), ("param_hess_grad", theta)):
        blocks = [part.sum() for part in (vector * (hessian @ grad)).split(sizes)]
        np.testing.assert_allclose(curvature[name], blocks, rtol=1e-10)
