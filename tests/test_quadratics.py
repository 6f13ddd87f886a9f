"""On a quadratic loss the second-order expansion is exact, for a step of any size; so is every recorded product."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import flat
from torch import Tensor, nn

from analysis import loss_decrease
from dynamics import Recorder, open_run


class Quadratic(nn.Module):
    """Two layers that own the parts of θ in L = ½ θᵀAθ + bᵀθ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(2, 2)
        root = torch.randn(9, 9)
        self.hessian, self.slope = root @ root.T + torch.eye(9), torch.randn(9)

    def loss(self) -> Tensor:
        theta = torch.cat([parameter.reshape(-1) for parameter in self.parameters()])
        return theta @ self.hessian @ theta / 2 + self.slope @ theta


@pytest.mark.parametrize("learning_rate", [1e-3, 0.3])
def test_second_order_step_is_exact_on_quadratics(tmp_path: Path, learning_rate: float) -> None:
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    moments = []
    with Recorder(
        tmp_path / "run", model, optimizer, objective=lambda model, batch: model.loss(), curvature_every=1
    ) as recorder:
        for _ in range(4):
            recorder.observe(None)
            optimizer.zero_grad()
            model.loss().backward()
            before = flat(list(model.parameters())).clone()
            optimizer.step()
            moments.append((before, flat(list(model.parameters())) - before))
    run = open_run(tmp_path / "run")
    curvature = run["curvature"].to_dataset()
    for row, (theta, update) in enumerate(moments):
        grad = model.hessian @ theta + model.slope
        total = curvature.isel(step=row).sum("layer")
        np.testing.assert_allclose(total.grad_sqnorm, grad @ grad, rtol=1e-12)
        np.testing.assert_allclose(total.grad_hess_grad, grad @ model.hessian @ grad, rtol=1e-12)
        np.testing.assert_allclose(total.param_hess_grad, theta @ model.hessian @ grad, rtol=1e-11)
        np.testing.assert_allclose(total.update_hess_update, update @ model.hessian @ update, rtol=1e-12)
        loss = [point @ model.hessian @ point / 2 + model.slope @ point for point in (theta, theta + update)]
        np.testing.assert_allclose([curvature.loss_before[row], curvature.loss_after[row]], loss, rtol=1e-11)
        change = total.grad_update + total.update_hess_update / 2
        np.testing.assert_allclose(change, loss[1] - loss[0], rtol=1e-9)
        split = (theta * (model.hessian @ grad)).split([3, 6])
        np.testing.assert_allclose(curvature.param_hess_grad[row], [part.sum() for part in split], rtol=1e-11)
    decrease = loss_decrease(run)
    np.testing.assert_allclose(decrease.second_order, decrease.measured, rtol=1e-9)
    assert not np.allclose(decrease.first_order, decrease.measured, rtol=1e-3 if learning_rate > 0.1 else 1e-6)
