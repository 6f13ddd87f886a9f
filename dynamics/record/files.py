"""Files that many processes see: each is complete at every moment, and those of a writer are locked."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

import filelock

PARTIAL = ".partial"

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a network's file system that is mounted without


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that whoever looks finds the old one or the new one; one that is killed leaves a part beside it.

    Raises:
        OSError: it could not be written, for a full disk say. The old one stays.
    """
    half = path.with_name(f".{path.name}{PARTIAL}")
    try:
        half.write_bytes(data)
        half.replace(path)
    except OSError:
        with suppress(OSError):
            half.unlink(missing_ok=True)
        raise


def locked(file: Path, taken: str) -> filelock.BaseFileLock:
    """A lock that one process has until it is released. The system takes it back from a process that dies.

    Raises:
        BlockingIOError: another has it; the message is ``taken``.
        OSError: the file system has no locks, or the file cannot be made.
    """
    lock = filelock.FileLock(file, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(taken) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        advice = "a lock keeps a second writer out of a record; record on another disk, or mount this one with locks"
        raise OSError(f"{file.parent} is on a file system without locks ({error.strerror}): {advice}") from error
    return lock
