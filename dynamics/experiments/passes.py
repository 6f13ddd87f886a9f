"""A training step before its optimizer's step: loss, correct predictions and gradient. On a GPU it is a CUDA graph."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import named
from ..hardware.captured import Captured, release_memory
from ..hardware.random_numbers import random_numbers_untouched

_WARM_UPS = 3  # as torch recommends before a capture, so that libraries choose kernels and allocate memory first


class Passes:
    """The forward and the backward pass of a classifier on a batch, into the parameters' ``grad``.

    On a GPU the kernels of both are captured at the first batch, and launched all at once from then on, for batches of
    its shape; others run one by one. Networks for CIFAR are so small that a GPU computes faster than Python launches
    kernels. The gradients are those of the capture, overwritten by each pass: ``zero_grad`` has nothing to do.

    Args:
        model: maps inputs to logits; its parameters are updated in place.
        temperature: T of the loss, the cross-entropy of logits / T.
        low: run both passes in bfloat16, by autocast.
    """

    def __init__(self, model: nn.Module, *, temperature: float, low: bool = False) -> None:
        self._model, self._temperature, self._low = model, temperature, low
        self._captured: _OneShape | None = None
        self._refused = False

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and how many of its samples are classified correctly; valid until the next call."""
        if inputs.is_cuda and self._captured is None and not self._refused:
            self._captured = self._capture(inputs, labels)
        if self._captured is not None and self._captured.fits(inputs):
            return self._captured(inputs, labels)
        return self._run(inputs, labels)

    def forget(self) -> None:
        """Drop the captured passes: the network's masks, hooks or mode have changed."""
        self._captured = None
        release_memory()

    def _run(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self._model.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._low):
            logits = self._model(inputs)
            loss = cross_entropy(logits / self._temperature, labels)
        loss.backward()
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _capture(self, inputs: Tensor, labels: Tensor) -> _OneShape | None:
        inputs, labels, device = inputs.clone(), labels.clone(), inputs.device
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        stream = torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device), random_numbers_untouched(device):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UPS):
                        self._run(inputs, labels)
                torch.cuda.current_stream().wait_stream(stream)
                passes = Captured(partial(self._run, inputs, labels), device)
        except RuntimeError as error:
            self._refused = True
            warnings.warn(
                f"training steps cannot be captured as CUDA graphs ({named(error)}): they run uncaptured", stacklevel=3
            )
            return None
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        return _OneShape(passes, inputs, labels, [(one, one.grad) for one in self._model.parameters()])


class _OneShape:
    """Captured passes, with the tensors from which they read a batch and to which they write gradients."""

    def __init__(
        self,
        passes: Captured[tuple[Tensor, Tensor]],
        inputs: Tensor,
        labels: Tensor,
        grads: list[tuple[nn.Parameter, Tensor | None]],
    ) -> None:
        self._passes, self._inputs, self._labels, self._grads = passes, inputs, labels, grads

    def fits(self, inputs: Tensor) -> bool:
        """Whether the passes were captured for inputs of this shape."""
        return inputs.shape == self._inputs.shape

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        for parameter, grad in self._grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        return self._passes()
