"""Work on a GPU as a CUDA graph: all its kernels are launched at once, in microseconds, not one after the other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")
_MOST = 16  # captures of a piece of work: one takes as long as several steps of what it saves


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
    """Work that comes again and again: captured when it comes to the same places in memory twice in a row.

    It is done one kernel after the other on a processor, within a capture of somebody else's, and where places keep
    changing.
    """

    def __init__(self) -> None:
        self._places: list[Hashable] = []
        self._captured: Captured | None = None
        self._captures = 0

    def __call__(self, work: Callable[[], _Result], places: list[Hashable], device: torch.device) -> _Result:
        """What ``work()`` does, and returns; ``places`` says where it reads and writes whatever may ever move."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return work()
        if places != self._places:
            self._places, self._captured = places, None
            return work()
        if self._captured is None:
            if self._captures == _MOST:
                return work()
            self._captures += 1
            self._captured = Captured(work, torch.cuda.Stream(device))
        return self._captured()


def release_memory() -> None:
    """Give back what graphs held that are gone: until then PyTorch keeps it, gigabytes a graph, for nobody."""
    torch.cuda.empty_cache()
