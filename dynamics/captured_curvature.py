"""The curvature of a step by two CUDA graphs: one of the loss and its gradient, one of what is measured with them."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

import torch
from torch import Tensor

from .captured import Captured, release_memory
from .probe import Probe
from .step import Measurement

_Gradient = tuple[Tensor, dict[str, Tensor]]


class CapturedCurvature:
    """What a :class:`Measurement` says of probes, captured when the second of a kind comes.

    The graphs read the batches, buffers and masks of that probe, into which those of later ones are copied. One of
    another kind, of a smaller batch say, is measured as if there were no graphs; so is one that draws random numbers.
    """

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._kind: Hashable = None
        self._probe: Probe | None = None  # the one that is captured
        self._gradient: Captured[_Gradient] | None = None
        self._values: Captured[dict[str, Tensor]] | None = None

    def gradient(self, probe: Probe) -> _Gradient:
        """The loss before the step and its own gradient, by parameter name; valid until the next."""
        kind = probe.kind, self._measurement.places
        if kind != self._kind:
            self._drop()
            found = self._measurement.gradient(probe)
            if self._may_capture(probe):
                self._kind = kind
            return found
        if self._gradient is None:
            self._probe = probe.fixed()
            self._gradient = self._captured(partial(self._measurement.gradient, self._probe))
        else:
            self._probe.take(probe)
        return self._gradient()

    def curvature_values(self, probe: Probe, loss: Tensor, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantities of ``/curvature`` at the probe whose gradient was asked for last."""
        if self._gradient is None:
            return self._measurement.curvature_values(probe, loss, grad)
        if self._values is None:
            self._values = self._captured(partial(self._measurement.curvature_values, self._probe, loss, grad))
        return {name: value.clone() for name, value in self._values().items()}

    def _drop(self) -> None:
        captured = self._gradient is not None
        self._probe = self._gradient = self._values = self._kind = None
        if captured:
            release_memory()

    def _may_capture(self, probe: Probe) -> bool:
        return self._on_gpu(probe) and not probe.draws and self._measurement.places is not None

    def _on_gpu(self, probe: Probe) -> bool:
        return probe.device.type == "cuda"

    def _captured(self, work: partial) -> Captured:
        return Captured(work, torch.cuda.Stream(self._probe.device))
