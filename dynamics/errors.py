"""What an exception says, in one line."""

from __future__ import annotations

from pathlib import Path


def one_line(error: BaseException) -> str:
    """The message, without line breaks."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The message's first line, or the exception's type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def named(error: BaseException) -> str:
    """The message after the exception's type."""
    return f"{type(error).__name__}: {one_line(error)}"


def check_folder(folder: Path, what: str) -> None:
    """Whether it is a folder, or can be made.

    Raises:
        NotADirectoryError: it, or one that it would be in, is a file. ``what`` says what goes into a folder.
    """
    for place in (folder, *folder.parents):
        if place.is_file():
            raise NotADirectoryError(f"{place} is a file: {what}")
