"""The message of an exception, in one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The message, without line breaks."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The message's first line, or the exception's type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def named(error: BaseException) -> str:
    """The message after the exception's type."""
    return f"{type(error).__name__}: {one_line(error)}"
