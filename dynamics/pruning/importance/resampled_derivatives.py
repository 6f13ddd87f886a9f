"""The derivatives that measures use, on bootstrap samples of batches; each batch is evaluated once for all samples.

Over the batches b with shares w_b the mean gradient is g = Σ_b w_b g_b, and the squared gradients of single samples
likewise; Hg is a sum over pairs, Σ_a Σ_b w_a w_b H_a g_b. The terms do not depend on the shares, so they are computed
once and combined anew for each draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...probing.batch import sample_count, tensors_of
from ...probing.objective import Objective
from ..candidates.weights import weight_of
from .derivatives import Derivatives, Passing, add
from .sample_gradients import squared_sample_grads
from .synaptic_flow import flow_gradient


def resampled_derivatives(
    model: nn.Module,
    layers: list[str],
    batches: Sequence[Any],
    shares: Tensor,
    uses: set[str],
    objective: Objective,
    mode: str,
) -> list[Derivatives]:
    """For each draw, what ``uses`` names, as :func:`derivatives` returns it, but only for the weights of ``layers``.

    ``shares`` (draw, batch): how much each batch counts in each draw; they sum to 1. For B batches Hg takes B² products
    and memory for B gradients and one product per draw.
    """
    passing, weights = Passing(model, objective, mode), [weight_of(name) for name in layers]
    draws, grads = [Derivatives() for _ in shares], []
    for passing.batch, by_draw in zip(batches, shares.T.tolist(), strict=True):
        if uses & {"grad", "hess_grad"}:
            grads.append(passing.probe.gradient({})[1])
            _share(draws, "grad", {name: grads[-1][name] for name in weights}, by_draw)
        if "squared_sample_grad" in uses:
            count = sample_count(passing.batch)
            squares = squared_sample_grads(model, layers, count, passing, mode)
            _share(draws, "squares", {name: square / count for name, square in squares.items()}, by_draw)
    if "hess_grad" in uses:
        for passing.batch, by_draw in zip(batches, shares.T, strict=True):
            expansion = passing.probe.expand()
            for grad, with_it in zip(grads, shares.T, strict=True):
                product = expansion.hessian_product([grad[name] for name in expansion.theta])
                named = dict(zip(expansion.theta, product, strict=True))
                _share(draws, "hess_grad", {name: named[name] for name in weights}, (by_draw * with_it).tolist())
    if "flow_grad" in uses:
        flow_grad = flow_gradient(model, tensors_of(batches[0])[0].shape[1:])
        for draw in draws:
            draw.flow_grad = flow_grad
    return draws


def _share(draws: list[Derivatives], field: str, terms: dict[str, Tensor], by_draw: list[float]) -> None:
    """Add to each draw its share of the terms from one batch, or one pair of batches."""
    for draw, share in zip(draws, by_draw, strict=True):
        add(getattr(draw, field), terms, share)
