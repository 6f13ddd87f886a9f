"""The output of commands: to a reader that may stop early, with errors in one line."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentError

from .errors import one_line


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a queue sends before it kills, where it interrupts as Ctrl-C does."""


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`Terminated`; only Python's main thread may handle signals."""

    def interrupt(*given: object) -> None:
        raise Terminated

    before = signal.getsignal(signal.SIGTERM)  # None: not installed from Python, so it could not be put back
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status after an interruption: 128 and the signal's number, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


@contextmanager
def printing() -> Iterator[None]:
    """Text printed inside is flushed at the end; a reader that stops early, such as ``head``, causes no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # discard what is left, also at Python's own last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_status(
    execute: Callable[[], int | None],
    *,
    mistakes: tuple[type[Exception], ...] = (),
    interrupted: str = "interrupted",
) -> int:
    """Exit status of a command: what it returns, or 0; 2 with one line on stderr for a user error.

    If it is interrupted, 130, or 143 after a SIGTERM.

    Args:
        execute: the command.
        mistakes: exceptions that are user errors, besides wrong arguments, values and files.
        interrupted: what is printed then, after the notes of the interruption.
    """
    of_users: tuple[type[Exception], ...] = (ArgumentError, ValueError, OSError, *mistakes)
    try:
        return execute() or 0
    except of_users as error:
        print(f"error: {mistake(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(*getattr(interrupt, "__notes__", ()), interrupted, sep="\n", file=sys.stderr)
        return status_of(interrupt)


def mistake(error: Exception) -> str:
    """The message; jsonargparse's in the words of the command line, with a pointer to --help."""
    if not isinstance(error, ArgumentError):
        return one_line(error)
    said = re.sub(r"<class '(\w+)'>", r"\1", one_line(error).rstrip(".")).replace("Parser key", "setting")
    said = re.sub(r"\b(?:run|sweep|protocols|show)\.(\w+)\b", r"\1", said)
    said = re.sub(r"Does not validate against any.*? - (Expected a \w+).*Given value: ", r"\1. Got value: ", said)
    said = re.sub(r"(arguments are required: .*)\boutput\b", r"\1-o/--output", said)
    said = re.sub(r"(Expected a tuple)\. Got value: ([\d.]+(?:,[\d.]+)*)$", r'\1, such as "[\2]", got \2', said)
    return f"{said}; see --help"
