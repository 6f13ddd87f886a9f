"""Checks that the applied gradients are finite, when rows arrive in the host's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..warning import warn


class FiniteGradients:
    """Warns once of the first applied gradient that is not finite.

    The thread that writes rows finds it, and the training's thread warns. There is no warning in a loop with a gradient
    scaler, which skips such steps.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self._found: tuple[int, str] | None = None
        self._said = False
        self.scaled = False  # whether a gradient scaler was seen

    def look(self, node: str, columns: Mapping[str, np.ndarray]) -> None:
        """Check rows of a node, given as columns by name."""
        if node != "steps" or "grad_sqnorm" not in columns or self._found:
            return
        for row, layer in np.argwhere(~np.isfinite(columns["grad_sqnorm"]))[:1]:
            self._found = int(columns["step"][row]), self._layers[layer]

    def say(self) -> None:
        """Warn if something was found and no warning was given yet."""
        if self._found is None or self._said or self.scaled:
            return
        self._said = True
        step, layer = self._found
        warn(
            f"‖g‖² of layer {layer} is not finite at step {step}: the optimizer was given an infinite or NaN "
            "gradient there, which is recorded as it is. If the training has not diverged, "
            "torch.autograd.set_detect_anomaly(True) shows where it comes from; a loop may skip such a step, "
            "as a gradient scaler does"
        )
