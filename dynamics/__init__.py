"""thetadot: records what a network's parameters, gradients and curvature do while it trains and is pruned."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from .record.errors import RecordError
from .record.reading import open_run
from .schema import QUANTITIES

if TYPE_CHECKING:
    from .recording.recorder import Recorder

__all__ = ["QUANTITIES", "RecordError", "Recorder", "open_run"]


def __getattr__(name: str) -> object:
    """Import the recorder, and with it torch, when it is first asked for: records are read without torch."""
    if name == "Recorder":
        from .recording.recorder import Recorder

        return Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, for completion; the recorder only where torch is installed, because ``help`` asks for each of them."""
    return sorted({*globals(), *(name for name in __all__ if name != "Recorder" or find_spec("torch"))})
