"""GPU work as a CUDA graph: all its kernels are launched at once, in microseconds, instead of one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")
_MOST = 16  # captures of a piece of work: one takes as long as several steps of what it saves
_ONE_AT_A_TIME = threading.RLock()


class Captured(Generic[_Result]):
    """Work that is captured here, and done at each call, on what is in the same places of memory then.

    It must have run once before, for kernels are loaded then, and neither wait for the GPU nor depend on what Python
    decides anew each time. What it returns stays in one place, too: the next call writes it over.

    Raises:
        Exception: what the work raised, if it cannot be captured.
    """

    def __init__(self, work: Callable[[], _Result], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with _ONE_AT_A_TIME, torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # other threads, such as the recorder's, may go on using the device meanwhile
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = work()
                except BaseException:
                    with contextlib.suppress(Exception):  # which would only say that the capture is not whole
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)

    def __call__(self) -> _Result:
        """Do it."""
        self._graph.replay()
        return self._result


class Repeated:
    """Work that comes again and again: captured when it comes to the same places in memory twice in a row.

    It is done one kernel after the other on a processor, within a capture of somebody else's, where places keep
    changing, and where it cannot be captured, for example for lack of memory.
    """

    def __init__(self) -> None:
        self._places: list[Hashable] | None = None
        self._captured: Captured | None = None
        self._left = _MOST

    def __call__(self, work: Callable[[], _Result], places: list[Hashable], device: torch.device) -> _Result:
        """What ``work()`` does, and returns; ``places`` says where it reads and writes whatever may ever move."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return work()
        if places != self._places:
            self._places, self._captured = places, None
            return work()
        if self._captured is None:
            if not self._left:
                return work()
            self._left -= 1
            try:
                self._captured = Captured(work, device)
            except Exception:
                self._left = 0
                return work()
        return self._captured()


def release_memory() -> None:
    """Give back what nobody uses any more, such as graphs that are gone: PyTorch would keep it, gigabytes each."""
    with _ONE_AT_A_TIME:
        torch.cuda.empty_cache()
