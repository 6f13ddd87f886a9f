"""Handles SIGTERM, which a scheduler sends before it kills: writes what is left, then passes the signal on."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_LOG = logging.getLogger("thetadot")


class on_termination:  # noqa: N801, called like a function
    """Call ``flush`` at SIGTERM, then the previous handler or, by default, end the process by SIGTERM.

    It is active until :meth:`close`, or as a context manager. Several may be active at once, and end in any order. Only
    Python's main thread may handle signals: elsewhere, nothing happens.
    """

    def __init__(self, flush: Callable[[], object]) -> None:
        self._flush, self._process, self._active = flush, os.getpid(), True
        self._previous = signal.getsignal(signal.SIGTERM) if _is_main_thread() else None
        if self._previous is not None:  # a handler that was not installed from Python could not be put back
            signal.signal(signal.SIGTERM, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        if self._active and os.getpid() == self._process:
            try:
                self._flush()
            except Exception:
                _LOG.exception("could not write what was left at SIGTERM")
        previous = self._previous
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Put the previous handler back, unless somebody has installed another since."""
        self._active = False
        while _is_main_thread() and isinstance(current := signal.getsignal(signal.SIGTERM), on_termination):
            if current._active:
                break
            signal.signal(signal.SIGTERM, current._previous)

    def __enter__(self) -> on_termination:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
