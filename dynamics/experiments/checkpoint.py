"""The state of a training between two epochs, in one file inside its record: where a killed run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import named

_NAME = ".checkpoint"


def save(record: Path, state: Mapping[str, Any]) -> None:
    """Keep a state of tensors, numbers and texts in place of the last one; a kill leaves either."""
    half = record / f"{_NAME}.partial"
    torch.save(dict(state), half)
    half.replace(record / _NAME)


def load(record: Path) -> dict[str, Any] | None:
    """The state that was kept last, on the CPU; None if there is none. No code of the file is run.

    Raises:
        ValueError: the file is damaged, or holds more than tensors, numbers and texts.
    """
    path = record / _NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = named(error)[:120]
        raise ValueError(f"{path} cannot be read ({reason}); remove it, and the run begins anew") from error


def saved_at(record: Path) -> int | None:
    """When a state was kept last, in nanoseconds; None if there is none."""
    path = record / _NAME
    return path.stat().st_mtime_ns if path.exists() else None


def remove(record: Path) -> None:
    """Let the state go."""
    (record / _NAME).unlink(missing_ok=True)
