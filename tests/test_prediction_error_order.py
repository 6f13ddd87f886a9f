"""The error of a prediction of order p falls as ηᵖ⁺¹: for a step with the coefficient ½, for the flow with 1."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import flat, recorded, smooth_network, vectors
from torch import Tensor

from analysis import loss_decrease

LADDER = (0.04, 0.02, 0.01, 0.005)
BATCH = vectors(1)[0]


def flow_loss_decrease(time: float, steps: int = 40) -> float:
    """L(θ(0)) − L(θ(t)) along θ̇ = −g, by classical Runge–Kutta."""
    torch.manual_seed(0)
    model = smooth_network()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        values = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, values, (BATCH[0],)), BATCH[1])

    velocity = torch.func.grad(lambda theta: -loss(theta))
    start = theta = flat(list(model.parameters()))
    width = time / steps
    for _ in range(steps):
        k1 = velocity(theta)
        k2 = velocity(theta + width / 2 * k1)
        k3 = velocity(theta + width / 2 * k2)
        k4 = velocity(theta + width * k3)
        theta = theta + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return float(loss(start) - loss(theta))


@pytest.mark.parametrize(
    ("prediction", "order"),
    [("first_order", 2), ("second_order", 3), ("first_order_flow", 2), ("second_order_flow", 3)],
)
def test_prediction_error_has_order(tmp_path: Path, prediction: str, order: int) -> None:
    errors = []
    for rung, learning_rate in enumerate(LADDER):
        torch.manual_seed(0)
        model = smooth_network()
        optimizer = torch.optim.SGD(model.parameters(), learning_rate)
        before = F.cross_entropy(model(BATCH[0]), BATCH[1]).item()
        decrease = loss_decrease(recorded(tmp_path / str(rung), model, optimizer, [BATCH], curvature_every=1))
        after = F.cross_entropy(model(BATCH[0]), BATCH[1]).item()
        truth = flow_loss_decrease(learning_rate) if "flow" in prediction else before - after
        errors.append(abs(float(decrease[prediction][0]) - truth))
    slope = np.polyfit(np.log(LADDER), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.1)


def test_a_quadratic_model_with_the_steps_half_does_not_predict_the_flow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), LADDER[0])
    decrease = loss_decrease(recorded(tmp_path / "run", model, optimizer, [BATCH], curvature_every=1))
    truth = flow_loss_decrease(LADDER[0])
    right, wrong = float(decrease.second_order_flow[0]), float(decrease.second_order[0])
    assert abs(right - truth) < 0.2 * abs(wrong - truth)
