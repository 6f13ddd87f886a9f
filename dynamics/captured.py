"""Work on a GPU as a CUDA graph: all its kernels are launched at once, in microseconds, not one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


class Captured(Generic[_Result]):
    """Work that is captured here, and done at each call, on what is in the same places of memory then.

    It must have run once before, for kernels are loaded then, and neither wait for the GPU nor depend on what Python
    decides anew each time. What it returns stays in one place, too: the next call writes it over.
    """

    def __init__(self, work: Callable[[], _Result], stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            # other threads, such as the recorder's, may go on using the device meanwhile
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._result = work()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(stream.device).wait_stream(stream)

    def __call__(self) -> _Result:
        """Do it."""
        self._graph.replay()
        return self._result


class Repeated:
    """A tensor that is computed again and again: captured when it is asked for in the same places the second time."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._captured: Captured[Tensor] | None = None

    def __call__(self, work: Callable[[], Tensor], reads: Sequence[Tensor]) -> Tensor:
        """What ``work()`` returns; it ``reads`` these tensors, all of one device, and whatever else never changes."""
        device = reads[0].device
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return work()
        places = [tensor.data_ptr() for tensor in reads]
        if places != self._places:
            self._places, self._captured = places, None
            return work()
        if self._captured is None:
            self._captured = Captured(work, torch.cuda.Stream(device))
        return self._captured().clone()
