"""The curvature of a step by two CUDA graphs: one for the loss and its gradient, one for what is measured with them."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

from torch import Tensor

from ..errors import named
from ..hardware.captured import Captured, release_memory
from ..probing.probe import Probe
from ..warning import warn
from .probed_step import ProbedStep

_Gradient = tuple[Tensor, dict[str, Tensor]]


class CapturedCurvature:
    """Measures probes as a :class:`ProbedStep` does, by CUDA graphs from the second probe of a kind on.

    The graphs read the batches, buffers and masks of that probe, into which those of later ones are copied. A probe of
    another kind, such as of a smaller batch, is measured without graphs; so is one that draws random numbers, counts in
    attributes or variables, runs modules with buffers outside the model, or has no second derivative. If a capture
    fails, no other is tried.
    """

    def __init__(self, probed: ProbedStep) -> None:
        self._probed = probed
        self._refused = False
        self._kind: Hashable = None  # kind of the probe that was measured last, if it may be captured
        self._probe: Probe | None = None  # the probe whose tensors the graphs read
        self._gradient: Captured[_Gradient] | None = None
        self._values: Captured[dict[str, Tensor]] | None = None

    def gradient(self, probe: Probe) -> _Gradient:
        """The loss before the step and its own gradient, by parameter name; the next call overwrites them."""
        kind = probe.kind, self._probed.places
        if kind != self._kind:
            self.drop()
            probe.doubted = self._captures
            found = self._probed.gradient(probe)
            self._kind = kind if None not in kind and self._may_capture(probe) else None
            return found
        if self._gradient is not None:
            self._probe.take(probe)
            return self._gradient()
        self._probe = probe.fixed()
        self._gradient = self._capture(partial(self._probed.gradient, probe))
        return self._probed.gradient(probe) if self._gradient is None else self._gradient()

    def curvature_values(self, probe: Probe, loss: Tensor, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantities of ``/curvature`` at the probe of the last call to :meth:`gradient`."""
        if self._gradient is None:
            values = self._probed.curvature_values(probe, loss, grad)
            if values.get("approximate"):
                self._kind = None
            return values
        if self._values is None:
            self._values = self._capture(partial(self._probed.curvature_values, self._probe, loss, grad))
        if self._values is None:
            return self._probed.curvature_values(probe, loss, grad)
        return {name: value.clone() for name, value in self._values().items()}

    def drop(self) -> None:
        """Release the graphs and their memory."""
        captured = self._gradient is not None
        self._probe = self._gradient = self._values = self._kind = None
        if captured:
            release_memory()

    def _may_capture(self, probe: Probe) -> bool:
        return probe.repeatable and self._captures

    @property
    def _captures(self) -> bool:
        """Whether anything may be captured at all."""
        return not self._refused and self._on_gpu()

    def _on_gpu(self) -> bool:
        return self._probed.on_one_gpu

    def _capture(self, work: partial) -> Captured | None:
        try:
            return self._captured(work)
        except Exception as error:
            self._probe.free()
            self._refused = True
            self._kind = None
            warn(f"curvature cannot be captured as CUDA graphs ({named(error)}): its kernels are launched one by one")
            return None

    def _captured(self, work: partial) -> Captured:
        return Captured(work, self._probe.device)
