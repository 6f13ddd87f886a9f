"""The state of a training between two epochs, in one file inside its record: where a killed run goes on."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import named
from ..record.files import replace

_NAME = ".checkpoint"


def save(record: Path, state: Mapping[str, Any]) -> None:
    """Keep a state of tensors, numbers and texts in place of the last one; a kill leaves either.

    Raises:
        OSError: it could not be written, for a full disk say. The last one stays.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)  # into memory: torch says nothing of a disk that is full
    replace(place(record), buffer.getbuffer())


def load(record: Path) -> dict[str, Any] | None:
    """The state that was kept last, on the CPU; None if there is none. No code of the file is run.

    Raises:
        ValueError: the file is damaged, or holds more than tensors, numbers and texts.
    """
    path = place(record)
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the sums that it writes
                raise ValueError(f"the sum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = named(error)[:120]
        raise ValueError(f"{path} cannot be read ({reason}); remove it, and the run begins anew") from error


def place(record: Path) -> Path:
    """The file."""
    return record / _NAME


def saved_at(record: Path) -> int | None:
    """When a state was kept last, in nanoseconds; None if there is none."""
    path = place(record)
    return path.stat().st_mtime_ns if path.exists() else None


def remove(record: Path) -> None:
    """Let the state go."""
    place(record).unlink(missing_ok=True)
