"""The state of a training between two epochs, in one file inside its record, from which a killed run continues."""

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
    """Save a state of tensors, numbers and strings in place of the last one; a kill leaves one or the other.

    Raises:
        OSError: it could not be written, for example because the disk is full. The previous state stays.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)  # into memory first: torch does not report a full disk
    replace(place(record), buffer.getbuffer())


def load(record: Path) -> dict[str, Any] | None:
    """The state that was saved last, on the CPU; None if there is none. No code from the file is run.

    Raises:
        ValueError: the file is damaged, or holds more than tensors, numbers and strings.
    """
    path = place(record)
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch writes checksums but never checks them
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = named(error)[:120]
        raise ValueError(f"{path} cannot be read ({reason}): remove it to start the run anew") from error


def place(record: Path) -> Path:
    """Path of the file with the state."""
    return record / _NAME


def saved_at(record: Path) -> int | None:
    """Time at which a state was last saved, in nanoseconds; None if there is none."""
    path = place(record)
    return path.stat().st_mtime_ns if path.exists() else None


def remove(record: Path) -> None:
    """Delete the saved state."""
    place(record).unlink(missing_ok=True)
