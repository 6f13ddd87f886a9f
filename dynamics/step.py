"""One training step: θ and g before it, what it did, and the curvature on its own batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .blocks import Vector
from .curvature import Expansion
from .groups import Groups
from .layers import Layers
from .probe import Probe
from .processes import Processes
from .quantities import FORMULAS, Vectors
from .store import Store


class Measurement:
    """Measures steps. Its vectors are made once and used at every step, so memory does not grow with their number."""

    def __init__(
        self, layers: Layers, groups: Groups, processes: Processes, steps: Sequence[str], curvature: Sequence[str]
    ) -> None:
        self._layers, self._groups, self._processes = layers, groups, processes
        self._steps = [name for name in steps if name in FORMULAS]
        self._curvature = [name for name in curvature if name in FORMULAS]
        self._losses = [name for name in curvature if name not in FORMULAS]
        self._make_vectors()
        self._start: Vector | None = None

    def param_sqnorm(self) -> np.ndarray:
        """‖θ‖² of each layer as it is now, (layer,)."""
        theta = self._layers.theta(self._layers.zeros()).blocks
        values = self._processes.total(self._layers.evaluate(["param_sqnorm"], Vectors(theta=theta)))
        return values["param_sqnorm"].cpu().numpy()

    def start_from(self, store: Store | None, *, begins: bool) -> None:
        """θ₀, for distances: θ as it is now where the record begins; later what was kept beside it, else NaN."""
        if "distance_sqnorm" not in self._steps:
            return
        self._start = self._layers.theta(self._layers.zeros())
        alone = store is not None and not self._processes.sharded
        if begins and alone:
            store.keep("start", self._start.blocks.cpu().numpy())
        elif not begins:
            kept = store.kept("start") if alone else None
            known = kept is not None and kept.shape == self._start.blocks.shape
            self._start.blocks.copy_(torch.from_numpy(kept) if known else torch.tensor(torch.nan))

    def _make_vectors(self) -> None:
        self._theta, self._grad, self._update = (self._layers.zeros() for _ in range(3))
        self._version = self._layers.version

    def begin(self) -> None:
        """Keep θ as it is before the step; no gradient is known yet."""
        if self._version != self._layers.version:
            self._make_vectors()
        self._layers.theta(self._theta)
        self._grad.blocks.zero_()

    def take_gradient(self, optimizer: int) -> None:
        """Keep g as an optimizer is about to apply it: the step may overwrite it."""
        self._groups.gradient(optimizer, self._grad)

    def end(self) -> None:
        """Take the update: θ as it is now less θ as it was."""
        self._layers.theta(self._update).blocks.sub_(self._theta.blocks)

    def step_values(self) -> dict[str, Tensor]:
        """The layers' quantities of ``/steps``, each (layer,)."""
        vectors = Vectors(
            theta=self._theta.blocks,
            grad=self._grad.blocks,
            update=self._update.blocks,
            start=None if self._start is None else self._start.blocks,
            decay=self._groups.decay() if "decay_sqnorm" in self._steps else None,
        )
        return self._layers.evaluate(self._steps, vectors)

    def curvature_values(self, expansion: Expansion, probe: Probe) -> dict[str, Tensor]:
        """The quantities of ``/curvature``, each (layer,), or a scalar."""
        layers, names = self._layers, list(expansion.theta)
        grad = self._processes.mean(expansion.grad)
        hess_grad = hess_update = None
        if {"grad_hess_grad", "param_hess_grad"} & set(self._curvature):
            hess_grad = self._product(expansion, grad)
        if "update_hess_update" in self._curvature:
            hess_update = self._product(expansion, layers.tensors(self._update.blocks, names))
        vectors = Vectors(
            theta=self._theta.blocks,
            grad=layers.vector(dict(zip(names, grad, strict=True))),
            update=self._update.blocks,
            applied=self._grad.blocks,
            hess_grad=hess_grad,
            hess_update=hess_update,
        )
        values = layers.evaluate(self._curvature, vectors)
        losses = {
            "loss_before": lambda: expansion.loss,
            "loss_after": probe.loss,
            "approximate": lambda: torch.tensor(float(not expansion.exact)),
        }
        return values | {name: losses[name]() for name in self._losses}

    def _product(self, expansion: Expansion, vector: Sequence[Tensor]) -> Tensor:
        return self._layers.vector(dict(zip(expansion.theta, expansion.hessian_product(vector), strict=True)))
