"""GPU work as a CUDA graph: all its kernels are launched at once, in microseconds, instead of one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")
_MOST = 16  # captures of one piece of work: each takes as long as it saves in several steps
_ONE_AT_A_TIME = threading.RLock()


class Captured(Generic[_Result]):
    """Captures work as a CUDA graph, which each call replays on whatever is at the same memory addresses then.

    The work must have run once before, which loads its kernels, and must neither wait for the GPU nor depend on
    decisions that Python makes anew each time. Its result stays at one address, too: the next call overwrites it.

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
                    with contextlib.suppress(Exception):  # it would only say that the capture is incomplete
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)

    def __call__(self) -> _Result:
        """Replay the work."""
        self._graph.replay()
        return self._result


class Repeated:
    """Runs work again and again; captures it once it uses the same memory addresses twice in a row.

    Without a graph it runs on a CPU, within somebody else's capture, where addresses keep changing, and where it cannot
    be captured, for lack of memory, for example.
    """

    def __init__(self) -> None:
        self._places: Sequence[Hashable] | None = None
        self._captured: Captured | None = None
        self._left = _MOST

    def __call__(self, work: Callable[[], _Result], places: Sequence[Hashable], device: torch.device) -> _Result:
        """The result of ``work()``; ``places``: memory addresses of all that it uses and that may ever move."""
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
    """Return unused GPU memory, such as that of deleted graphs, which PyTorch would keep, gigabytes each."""
    with _ONE_AT_A_TIME:
        torch.cuda.empty_cache()
