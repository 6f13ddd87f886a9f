"""Calls something before a chosen bytecode, as a signal may come between any two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType


@contextmanager
def before_bytecode(
    at: int, action: Callable[[], object], within: Callable[[CodeType], bool]
) -> Iterator[Callable[[], bool]]:
    """Inside, call the action before the ``at``-th bytecode of such code; yields whether it came there."""
    left = at

    def trace(frame: FrameType, event: str, argument: object) -> Callable | None:
        nonlocal left
        if not within(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                action()
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 traces bytecodes if a frame asked for them before
    sys.settrace(trace)
    try:
        yield lambda: left <= 0
    finally:
        sys.settrace(before)
