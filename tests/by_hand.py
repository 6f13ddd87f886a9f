"""The quantities of a step computed by hand beside a loop: plain sums over ``.grad`` and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from dynamics import open_run


class ByHand:
    """Call :meth:`before` right before the optimizer steps, :meth:`after` right after; then compare with the record."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(model.named_parameters())
        self.rows: list[dict[str, dict[str, float]]] = []
        self.start = {name: wide(parameter) for name, parameter in self.named.items()}

    def before(self, held: Sequence[nn.Parameter] | None = None) -> None:
        """Copy θ and the gradients of the parameters that are about to step (all by default)."""
        ours = {id(parameter) for parameter in (self.named.values() if held is None else held)}
        self.theta = {name: wide(parameter) for name, parameter in self.named.items()}
        self.grad = {
            name: wide(p.grad) if p.grad is not None and id(p) in ours else torch.zeros_like(self.theta[name])
            for name, p in self.named.items()
        }

    def after(self) -> None:
        """Sum up the step by layer."""
        row: dict[str, dict[str, float]] = {}
        for name, parameter in self.named.items():
            theta, grad = self.theta[name], self.grad[name]
            update = wide(parameter) - theta
            values = {
                "param_sqnorm": theta.square(),
                "param_sqnorm_rate": -2 * theta * grad,
                "grad_sqnorm": grad.square(),
                "param_grad": theta * grad,
                "abs_param_grad": (theta * grad).abs(),
                "distance_sqnorm": (theta - self.start[name]).square(),
                "update_sqnorm": update.square(),
                "param_update": theta * update,
                "grad_update": grad * update,
            }
            layer = row.setdefault(name.rpartition(".")[0] or "(root)", dict.fromkeys(values, 0.0))
            for key, value in values.items():
                layer[key] += value.sum().item()
        self.rows.append(row)

    def agrees_with(self, steps: xr.DataTree, rtol: float = 1e-10) -> None:
        """Assert that the record says the same; to ``rtol`` of the largest layer where a sum may cancel."""
        assert steps.sizes["step"] == len(self.rows) > 0
        assert set(steps.layer.values) == set(self.rows[0])
        for name in next(iter(self.rows[0].values())):
            expected = np.array([[row[layer][name] for layer in steps.layer.values] for row in self.rows])
            least = rtol * np.abs(expected).max()
            np.testing.assert_allclose(steps[name], expected, rtol, least + 1e-300, err_msg=name)


def curvature_by_hand(loss: Tensor, parameters: Sequence[Tensor]) -> dict[str, float]:
    """Loss, ‖g‖², gᵀHg and θᵀHg by two backward passes through a loop's own graph, which stays."""
    grad = torch.autograd.grad(loss, parameters, create_graph=True)
    square = sum((part * part.detach()).sum() for part in grad)
    product = torch.autograd.grad(square, parameters, retain_graph=True)
    along = [sum((a * b).sum().item() for a, b in zip(product, of, strict=True)) for of in (grad, parameters)]
    return {"loss_before": loss.item(), "grad_sqnorm": square.item(),
            "grad_hess_grad": along[0], "param_hess_grad": along[1]}  # fmt: skip


def is_of_its_steps(path: Path, losses: Sequence[float]) -> None:
    """Assert that a record's curvature is of what was trained on: of these losses, and of the gradients applied."""
    curvature = open_run(path)["curvature"]
    np.testing.assert_allclose(curvature.loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm, curvature.applied_grad_sqnorm, rtol=1e-12)


def wide(tensor: Tensor) -> Tensor:
    """A copy in double precision, real and dense."""
    tensor = tensor.detach().to_dense()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.double().clone()
