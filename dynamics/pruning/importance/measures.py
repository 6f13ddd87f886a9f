"""The importance measures: one score per filter (or weight); the lowest are pruned first.

All measures see a layer's weights θ and, as far as they use them, the gradient g and the Hessian product Hg, where g
and H are those of the mean loss over *all* trainable parameters. Some differ only in whether a score has a sign, and
whether the absolute value is taken before or after the sum over a filter:

================================  =============  ========================================================
absolute before the sum           Σ|θg|          loss_preservation, snip, loss_preservation_times_magnitude,
                                                 loss_preservation_times_distance
absolute after the sum            |Σθg|          taylor, gradient_norm_preservation
signed                            Σθ(Hg)         gradient_norm_increase, grasp
================================  =============  ========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...schema import HIGHEST_FIRST


@dataclass(frozen=True)
class Evidence:
    """What a measure may use, for one layer; None where none of the requested measures uses it."""

    theta: Tensor  # θ, shape (filter, ...), zero where it is pruned or reads a pruned channel
    initial: Tensor | None = None  # θ₀, θ at initialisation
    grad: Tensor | None = None  # g
    hess_grad: Tensor | None = None  # Hg
    squared_sample_grad: Tensor | None = None  # mean over samples n of (θ_fᵀ g_n)², (filter,)
    flow_grad: Tensor | None = None  # ∂R/∂|θ| of synaptic flow R
    scale: Tensor | None = None  # γ of the normalisation that follows, (filter,)
    uniform: Tensor | None = None  # independent uniform numbers, one per unit


@dataclass(frozen=True)
class Measure:
    """One row of :data:`MEASURES`.

    ``uses`` names the field of :class:`Evidence` that it uses besides θ. ``order`` is the highest derivative of the
    loss it needs, ``temperature`` the one that its paper uses. ``entries`` gives a number for every weight, and
    ``combine`` the score of each filter from those of its weights, (filter, weights); a single weight is scored as a
    filter of one weight, and not at all by a measure that is ``per_filter``. ``needs_initial``: it uses θ₀.
    ``normalised``: divided by the sum over the whole network. ``class_balanced``: its paper takes equally many samples
    of each class.
    """

    name: str
    formula: str
    order: int
    temperature: float
    uses: str | None
    entries: Callable[[Evidence], Tensor]
    combine: Callable[[Tensor], Tensor]
    class_balanced: bool = False
    per_filter: bool = False
    needs_initial: bool = False
    normalised: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether it needs batches; synflow only uses the shape of an input."""
        return self.uses in ("grad", "hess_grad", "squared_sample_grad", "flow_grad")

    @property
    def highest_first(self) -> bool:
        """Whether the highest scores are pruned, not the lowest."""
        return self.name in HIGHEST_FIRST

    def __repr__(self) -> str:
        return f"<{self.name}: {self.formula}>"


def _sum(entries: Tensor) -> Tensor:
    return entries.sum(1)


def _abs_sum(entries: Tensor) -> Tensor:
    return entries.sum(1).abs()


MEASURES: dict[str, Measure] = {
    row.name: row
    for row in (
        Measure("magnitude", "‖θ_f‖₂", 0, 1.0, None,
                lambda e: e.theta.square(), lambda s: s.sum(1).sqrt()),
        Measure("loss_preservation", "Σ|θg|", 1, 5.0, "grad",
                lambda e: (e.theta * e.grad).abs(), _sum),
        Measure("loss_preservation_times_magnitude", "Σ|θ²g|", 1, 5.0, "grad",
                lambda e: (e.theta.square() * e.grad).abs(), _sum),
        Measure("loss_preservation_times_distance", "Σ|θ−θ₀||θg|", 1, 5.0, "grad",
                lambda e: ((e.theta - e.initial) * e.theta * e.grad).abs(), _sum, needs_initial=True),
        Measure("gradient_norm_increase", "Σθ(Hg)", 2, 200.0, "hess_grad",
                lambda e: e.theta * e.hess_grad, _sum, class_balanced=True),
        Measure("gradient_norm_preservation", "|Σθ(Hg)|", 2, 1.0, "hess_grad",
                lambda e: e.theta * e.hess_grad, _abs_sum, class_balanced=True),
        Measure("magnitude_l1", "‖θ_f‖₁", 0, 1.0, None, lambda e: e.theta.abs(), _sum),
        Measure("bn_scale", "|γ_f|", 0, 1.0, "scale",
                lambda e: e.scale.abs(), _sum, per_filter=True),
        Measure("taylor", "|Σθg|", 1, 1.0, "grad", lambda e: e.theta * e.grad, _abs_sum),
        Measure("fisher", "½⟨(θ_fᵀgₙ)²⟩ₙ", 1, 1.0, "squared_sample_grad",
                lambda e: e.squared_sample_grad / 2, _sum, per_filter=True),
        Measure("snip", "Σ_f|θg| / Σ|θg|", 1, 1.0, "grad",
                lambda e: (e.theta * e.grad).abs(), _sum, normalised=True),
        Measure("grasp", "−Σθ(Hg)", 2, 200.0, "hess_grad",
                lambda e: -e.theta * e.hess_grad, _sum, class_balanced=True),
        Measure("synflow", "Σ|θ|∂R/∂|θ|", 0, 1.0, "flow_grad",
                lambda e: e.theta.abs() * e.flow_grad, _sum),
        Measure("random", "uniform", 0, 1.0, "uniform", lambda e: e.uniform, _sum),
    )
}  # fmt: skip


def find_measure(name: str) -> Measure:
    """The row of a measure.

    Raises:
        ValueError: there is no such measure; the message lists those there are.
    """
    if not isinstance(name, str) or name not in MEASURES:
        raise ValueError(f"unknown measure {name!r:.60}: choose one of {', '.join(MEASURES)}")
    return MEASURES[name]


def normalised(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by their sum over the whole network, so that they add up to 1 (SNIP, Lee et al. 2019, eq. 4).

    In a network that is dead all of them are 0.
    """
    total = torch.stack([values.sum() for values in scores.values()]).sum()
    total = total.clamp(min=torch.finfo(total.dtype).tiny)
    return {name: values / total for name, values in scores.items()}
