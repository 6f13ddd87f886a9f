"""Every quantity adds up over the layers to that of the flattened network, computed densely."""

from pathlib import Path

import numpy as np
import torch
from networks import dense, flat, plain_step, smooth_network, vectors

from dynamics import Recorder, open_run
from dynamics.quantities import FORMULAS


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
    assert asked == set(oracle), "write what each quantity is of the whole network, from the dense vectors"
    for node in ("steps", "curvature"):
        dataset = run[node].to_dataset().isel(step=1)
        for name in (name for name in FORMULAS if name in dataset):
            np.testing.assert_allclose(dataset[name].sum("layer"), oracle[name], rtol=1e-9, err_msg=name)


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
