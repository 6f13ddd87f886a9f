"""Checks where results may be written, before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(folder: Path, what: str, example: str) -> None:
    """Check that ``what`` may be written into a folder, which exists or can be created.

    Raises:
        NotADirectoryError: there is a file in its place, or above it, or a link to what is not there.
        PermissionError: it may not be written.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    said = place if folder.is_absolute() else Path(os.path.relpath(place))
    if link := dead_link(place):
        raise NotADirectoryError(f"{said} {link}: {what} need a folder")
    if not place.is_dir():
        raise NotADirectoryError(f"{said} is a file: {what} need a folder, such as {example}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"you may not write into {said}: {what} need a folder of your own, such as {example}")


def dead_link(path: Path) -> str:
    """What is wrong with a path that is a link to what is not there; empty for any other."""
    is_dead = path.is_symlink() and not path.exists()
    return f"is a link to {os.readlink(path)}, which is not there" if is_dead else ""
