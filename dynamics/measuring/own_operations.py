"""Checks whether a user's own operations pass on the true gradient of what they compute, and its derivative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..float64 import widened
from ..probing.probe import Probe

_Theta = Mapping[str, Tensor]


class Doubt(NamedTuple):
    """A doubt about the ``gradient`` (that it is not the loss's) or, if False, about the curvature; ``text`` warns."""

    gradient: bool
    text: str


def doubt(probe: Probe, theta: _Theta, grad: _Theta, grad_hess_grad: Tensor) -> Doubt | None:
    """A doubt if the loss does not change along g as g says, or g not as gᵀHg, (layer,), says; else None.

    Some operations pass on a gradient other than their own, and some backward passes are not differentiable. The
    changes are central differences of losses and gradients; a deviation within their error is no reason to doubt.
    """
    length, size = (float(torch.nn.utils.get_total_norm(list(one.values()))) for one in (grad, theta))
    if not length:  # nothing is passed on
        return None
    exact, bound = float(grad_hess_grad.sum()), float(grad_hess_grad.abs().sum())
    rounding = probe.rounding
    # far enough to exceed rounding, near enough for g to change only by a fraction of itself
    epsilon = min(rounding ** (1 / 3) * (1 + size) / max(length, 1e-300), length**2 / max(100 * bound, 1e-300))
    losses, slopes = zip(*(_along(probe, theta, grad, far) for far in (-epsilon, 0.0, epsilon)), strict=True)
    noise, passed_on = 10 * rounding / epsilon, slopes[1]
    bent = abs(slopes[0] + slopes[2] - 2 * slopes[1]) / 2
    slope, change = (losses[2] - losses[0]) / (2 * epsilon), (slopes[2] - slopes[0]) / (2 * epsilon)
    rounded = max(abs(losses[1]), 1.0)  # a loss near zero is a difference of larger numbers
    if _differ(passed_on, slope, 0.05, noise * rounded + bent):
        return Doubt(
            True,
            "an operation or hook that is not torch's passes on a gradient other than that of what it computes, as "
            f"gradient reversal and straight-through estimators do: along g the loss changes by {slope:.4g}, "
            f"but by {passed_on:.4g} according to g. Predicted changes of the loss use the gradient that is "
            "passed on, which is not that of the measured loss and has no curvature",
        )
    if _differ(exact, change, 0.1, noise * length**2 + 3 * bent / epsilon):
        return Doubt(
            False,
            "the curvature of an operation that is not torch's is not the change of its gradient: gᵀHg is "
            f"{exact:.4g} by its backward pass, and {change:.4g} by differences of gradients. An operation "
            "that passes on a gradient other than its own has no curvature; if autograd cannot differentiate "
            "its backward pass, or a hook on a tensor, write it as a function with "
            "@torch.autograd.function.once_differentiable, and differences are recorded",
        )
    return None


def _along(probe: Probe, theta: _Theta, direction: _Theta, distance: float) -> tuple[float, float]:
    """The loss at θ + distance · direction, and its slope along the direction there, according to its gradient."""
    there = {name: one + distance * direction[name] if name in direction else one for name, one in theta.items()}
    loss, grad = probe.gradient(there)
    return loss.item(), sum((widened(grad[name]) * direction[name]).sum().item() for name in direction)


def _differ(one: float, other: float, share: float, noise: float) -> bool:
    return abs(one - other) > share * max(abs(one), abs(other)) + noise
