"""The derivatives that measures use, gathered from streamed batches, of which only one is held at a time.

The mean loss over the batches is L = Σ_b n_b L_b / Σ_b n_b. Its gradient g takes one pass, and so do the squared
gradients of single samples; Hg takes a second pass, and serves all measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ...hardware.precision import precise
from ...probing.batch import as_measured, sample_count, tensors_of
from ...probing.objective import Objective
from ...probing.probe import Probe
from .sample_gradients import squared_sample_grads
from .synaptic_flow import flow_gradient

_SAME = 1e-4  # relative change of the mean loss between the passes that rounding and GPU kernels may make


@dataclass
class Derivatives:
    """Sums over batches while they stream, means afterwards: parameter name → tensor; ``squares`` by layer's name."""

    samples: int = 0
    loss: Tensor | float = 0.0
    grad: dict[str, Tensor] = field(default_factory=dict)
    hess_grad: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    flow_grad: dict[str, Tensor] = field(default_factory=dict)


class Passing:
    """The loss at the present batch of a stream: one probe serves all batches, and none is held after its turn."""

    def __init__(self, model: nn.Module, objective: Objective, mode: str) -> None:
        self.batch: Any = None
        self._device, self._objective = next(model.parameters()).device, objective
        self.probe = Probe(model, self, [()], mode=mode)

    def __call__(self, model: nn.Module, nothing: Any) -> Tensor:
        """The objective at the present batch."""
        return self._objective(model, as_measured(self.batch, self._device))


def derivatives(
    model: nn.Module, layers: list[str], batches: Iterable[Any], uses: set[str], objective: Objective, mode: str
) -> Derivatives:
    """What ``uses`` names among grad, hess_grad, squared_sample_grad (for ``layers``) and flow_grad, over the batches.

    For Hg the batches are read twice, so those of an iterator are kept; a loader must yield the same samples again.

    Raises:
        ValueError: there are no batches, or different ones at the second pass.
    """
    if "hess_grad" in uses and iter(batches) is batches:
        batches = list(batches)
    passing = Passing(model, objective, mode)
    found = Derivatives()
    for passing.batch in islice(batches, 1 if uses == {"flow_grad"} else None):  # synflow only needs an input's shape
        count = sample_count(passing.batch)
        if "flow_grad" in uses and not found.flow_grad:
            found.flow_grad = flow_gradient(model, tensors_of(passing.batch)[0].shape[1:])
        if uses & {"grad", "hess_grad"}:
            loss, grad = passing.probe.gradient({})
            found.loss += count * loss
            add(found.grad, grad, count)
        if "squared_sample_grad" in uses:
            add(found.squares, squared_sample_grads(model, layers, count, passing, mode), 1)
        found.samples += count
    if not found.samples:
        raise ValueError("scores need at least one batch: pass batches of (inputs, labels), got none")
    found.loss = found.loss / found.samples
    for total in (*found.grad.values(), *found.squares.values()):
        total.div_(found.samples)
    if "hess_grad" in uses:
        found.hess_grad = _hessian_product(passing, batches, found)
    return found


def add(sums: dict[str, Tensor], terms: dict[str, Tensor], weight: float) -> None:
    """Add the terms times a weight to sums of the same names."""
    for name, term in terms.items():
        sums[name] = sums[name].add_(term, alpha=weight) if name in sums else weight * precise(term)


def _hessian_product(passing: Passing, batches: Iterable[Any], first: Derivatives) -> dict[str, Tensor]:
    """Hg, by parameter name."""
    again = Derivatives()
    for passing.batch in batches:
        count = sample_count(passing.batch)
        expansion = passing.probe.expand()
        product = expansion.hessian_product([first.grad[name].to(one.dtype) for name, one in expansion.theta.items()])
        add(again.hess_grad, dict(zip(expansion.theta, product, strict=True)), count)
        again.samples += count
        again.loss += count * expansion.loss
    if again.samples != first.samples or _differs(again.loss / again.samples, first.loss):
        raise ValueError(
            "second-order measures iterate over the batches twice, and the second time these were others: "
            "pass a list of batches, or a loader that neither shuffles nor augments"
        )
    return {name: total / again.samples for name, total in again.hess_grad.items()}


def _differs(one: Any, other: Any) -> bool:
    return bool((one - other).abs() > _SAME * other.abs())  # False for NaN: the network has diverged
