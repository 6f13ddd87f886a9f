"""Files that several processes share: each is complete at every moment, and a writer's are locked."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

import filelock

PARTIAL = ".partial"

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # a network file system mounted without locks


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that readers find the old or the new one, whole; a killed writer leaves a partial file beside it.

    Raises:
        OSError: it could not be written, because the disk is full, say. The old file stays.
    """
    half = path.with_name(f".{path.name}{PARTIAL}")
    try:
        half.write_bytes(data)
        half.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # when a disk is full, the system does not say where
            error.filename = str(path)
        with suppress(OSError):
            half.unlink(missing_ok=True)
        raise


def locked(file: Path, taken: str) -> filelock.BaseFileLock:
    """A lock that one process holds until it is released; the system releases that of a process that dies.

    Raises:
        BlockingIOError: another process holds it; the message is ``taken``.
        OSError: the file system has no locks, or the file cannot be created.
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
