"""Errors for a path that is not a record, or is a damaged one."""

from __future__ import annotations

from pathlib import Path

from ..errors import one_line

AGAIN = "copy the record again from where it was written"


class RecordError(ValueError):
    """A path that is not a record this version can read. The message is one line."""


def foreign(path: Path, reason: str) -> RecordError:
    """The error for a path that the recorder did not write, with the reason."""
    return RecordError(f"{path} is not a thetadot record (a folder written by Recorder): {reason}")


def damaged(chunk: Path, error: BaseException) -> RecordError:
    """The error for a chunk that cannot be decoded."""
    return RecordError(f"{chunk} is damaged ({said(error)}); {AGAIN}")


def said(error: BaseException) -> str:
    """The beginning of an exception's message, on one line; its type if it has none."""
    return one_line(error)[:200] or type(error).__name__
