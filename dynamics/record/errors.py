"""What is said of a path that is no record, or a damaged one."""

from __future__ import annotations

from pathlib import Path

from ..errors import one_line

AGAIN = "copy the record again from where it was written"


class RecordError(ValueError):
    """A path that is not a record this version can read. The message is one line."""


def foreign(path: Path, reason: str) -> RecordError:
    """Nothing that the recorder wrote: why not."""
    return RecordError(f"{path} is not a thetadot record (a folder written by Recorder): {reason}")


def damaged(chunk: Path, error: Exception) -> RecordError:
    """A chunk cannot be decoded: what to say, and to do."""
    return RecordError(f"{chunk} is damaged ({said(error)}); {AGAIN}")


def said(error: Exception) -> str:
    """The beginning of an exception's message, in one line."""
    return one_line(error)[:200] or type(error).__name__
