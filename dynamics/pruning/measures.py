"""The importance measures: one score a filter (or a weight); the lowest are pruned first.

All measures see the convolution's weights θ, their gradient g and their part of the Hessian product Hg, where g and H
are those of the mean loss over *all* trainable parameters. Where an absolute value stands, before or after the sum over
a filter, is the difference between some of them; the formulas say it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """What a measure may look at, for one convolution. Vectors that the measure's order does not need are None."""

    theta: Tensor  # θ, shape (filter, ...)
    grad: Tensor | None  # g
    hess_grad: Tensor | None  # Hg
    scale: Tensor | None  # γ of the normalisation that follows, (filter,)
    squared_sample_grad: Tensor | None  # mean over samples n of (θ_fᵀ g_n)², (filter,)


@dataclass(frozen=True)
class Measure:
    """One row of :data:`MEASURES`.

    ``order`` is the highest derivative of the loss it needs. ``temperature`` is the one that the paper uses.
    ``entries`` gives a score for every weight; ``combine`` makes a filter's score from its weights' (filter, weights).
    """

    name: str
    label: str
    formula: str
    order: int
    temperature: float
    entries: Callable[[Evidence], Tensor]
    combine: Callable[[Tensor], Tensor]
    class_balanced: bool = False
    per_filter: bool = False


def _sum(entries: Tensor) -> Tensor:
    return entries.sum(1)


def _abs_sum(entries: Tensor) -> Tensor:
    return entries.sum(1).abs()


def _scale(evidence: Evidence) -> Tensor:
    if evidence.scale is None:
        raise ValueError(
            "bn_scale needs a normalisation with a scale γ after every convolution; this network lacks one"
        )
    return evidence.scale.abs()


MEASURES: dict[str, Measure] = {
    row.name: row
    for row in (
        Measure("magnitude", "Magnitude", "‖θ_f‖₂", 0, 1.0, lambda e: e.theta.square(), lambda s: s.sum(1).sqrt()),
        Measure("loss_preservation", "Loss preservation", "Σ|θg|", 1, 5.0,
                lambda e: (e.theta * e.grad).abs(), _sum),
        Measure("loss_preservation_times_magnitude", "Loss preservation × magnitude", "Σ|θ²g|", 1, 5.0,
                lambda e: (e.theta.square() * e.grad).abs(), _sum),
        Measure("gradient_norm_increase", "Gradient-norm increase (GraSP)", "Σθ(Hg)", 2, 200.0,
                lambda e: e.theta * e.hess_grad, _sum, class_balanced=True),
        Measure("gradient_norm_preservation", "Gradient-norm preservation", "|Σθ(Hg)|", 2, 1.0,
                lambda e: e.theta * e.hess_grad, _abs_sum, class_balanced=True),
        Measure("magnitude_l1", "Magnitude, L1", "‖θ_f‖₁", 0, 1.0, lambda e: e.theta.abs(), _sum),
        Measure("bn_scale", "BatchNorm scale", "|γ_f|", 0, 1.0, _scale, _sum, per_filter=True),
        Measure("taylor", "Taylor", "|Σθg|", 1, 1.0, lambda e: e.theta * e.grad, _abs_sum),
        Measure("fisher", "Fisher", "½⟨(θ_fᵀgₙ)²⟩ₙ", 1, 1.0,
                lambda e: e.squared_sample_grad / 2, _sum, per_filter=True),
        Measure("random", "Random", "uniform", 0, 1.0,
                lambda e: torch.rand_like(e.theta.flatten(1)[:, 0]), _sum, per_filter=True),
    )
}  # fmt: skip


def find_measure(name: str) -> Measure:
    """The row of a measure.

    Raises:
        ValueError: there is no such measure; the message lists those there are.
    """
    if name not in MEASURES:
        raise ValueError(f"unknown measure {name!r}: choose one of {', '.join(MEASURES)}")
    return MEASURES[name]
